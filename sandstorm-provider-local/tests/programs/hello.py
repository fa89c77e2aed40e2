import sys

sys.stdout.write(f"hello {sys.stdin.readline().strip()} {','.join(sys.argv[1:])}\n")
sys.stderr.write("warned\n")
sys.exit(3)
