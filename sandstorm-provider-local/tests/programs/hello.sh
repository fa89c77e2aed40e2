read -r line
words="$*"
echo "hello $line ${words// /,}"
echo warned >&2
exit 3
