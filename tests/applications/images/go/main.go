// A counter, and a log that is followed: chunks as they come.
package main

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"time"
)

var count, ticks int64

func main() {
	go func() {
		for range time.Tick(100 * time.Millisecond) {
			atomic.AddInt64(&ticks, 1)
		}
	}()
	http.HandleFunc("/count", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, atomic.AddInt64(&count, 1)) })
	http.HandleFunc("/ticks", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, atomic.LoadInt64(&ticks)) })
	http.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		for n := 0; n < 5; n++ {
			fmt.Fprintln(w, n)
			w.(http.Flusher).Flush()
			time.Sleep(100 * time.Millisecond)
		}
	})
	panic(http.ListenAndServe(":8080", nil))
}
