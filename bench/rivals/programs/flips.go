// The same answer by Go's own server, which tableflip replaces: flips NETWORK ADDRESS PID_FILE.
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
)

func main() {
	file, err := os.ReadFile(os.Getenv("RELEASE"))
	check(err)
	release := strings.Fields(string(file))
	status, said := 200, "pong"
	switch release[0] {
	case "broken":
		os.Exit(3)
	case "slow":
		time.Sleep(1500 * time.Millisecond)
	case "answers-500":
		status, said = 500, "fail"
	}
	upgrader, err := tableflip.New(tableflip.Options{PIDFile: os.Args[3]})
	check(err)
	defer upgrader.Stop()
	go func() {
		hangup := make(chan os.Signal, 1)
		signal.Notify(hangup, syscall.SIGHUP)
		for range hangup {
			if err := upgrader.Upgrade(); err != nil {
				fmt.Fprintln(os.Stderr, "upgrade failed:", err)
			}
		}
	}()
	go func() {
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		<-stop
		upgrader.Stop()
	}()
	listener, err := upgrader.Listen(os.Args[1], os.Args[2])
	check(err)
	body := fmt.Sprintf("%d %s %s", os.Getpid(), release[1], said)
	server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		w.Write([]byte(body))
	})}
	go server.Serve(listener)
	check(upgrader.Ready())
	<-upgrader.Exit()
	limit, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	server.Shutdown(limit)
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
