package main

import (
	"bufio"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	mathrand "math/rand"
	"os"
)

func main() {
	mathrand.Seed(int64(os.Getpid()))
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if lines.Text() == "draw" {
			bytes := make([]byte, 16)
			rand.Read(bytes)
			fmt.Printf("{\"crypto/rand\": \"%s\", \"math/rand\": %d, \"own\": %d}\n", hex.EncodeToString(bytes), mathrand.Int63(), numbers().Int63())
		} else {
			renew()
			fmt.Println("null")
		}
	}
}
