<?php
$line = trim(fgets(STDIN));
echo "hello $line ", implode(",", array_slice($argv, 1)), "\n";
fwrite(STDERR, ctype_digit("1") ? "warned\n" : "ctype is missing\n");
exit(3);
