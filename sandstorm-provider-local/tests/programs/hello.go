package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"
)

func main() {
	line, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	fmt.Println("hello", strings.TrimSpace(line), strings.Join(os.Args[1:], ","))
	fmt.Fprintln(os.Stderr, "warned")
	os.Exit(3)
}
