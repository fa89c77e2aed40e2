"""Keeps one sandbox for several programs: files in, a program, its output as it comes, files out."""

import sys

from sandstorm import Sandstorm

with Sandstorm() as sandstorm, sandstorm.sandbox() as box:
    box.upload("data/numbers.txt", b"3\n1\n2\n")
    with box.exec("sort", "data/numbers.txt") as running:
        for output in running:
            sys.stdout.write(output.data.decode())
    assert running.exit is not None
    assert running.exit.ok
    box.run("open('total.txt', 'w').write(str(sum(int(n) for n in open('data/numbers.txt'))))", language="python")
    print("total:", box.download("total.txt").decode())
