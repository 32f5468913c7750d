"""Answers line by line, and prints each line on stdout as well."""

import socket
import threading

from plain import say, take


def serve(client: socket.socket) -> None:
    try:
        with client, client.makefile("rwb") as lines:
            for line in lines:
                print(line.decode().rstrip("\n"), flush=True)
                lines.write(line)
                lines.flush()
    except ConnectionError:
        pass  # a client need not hear the answer


say(b"READY=1")
threads = []
while taken := take():
    client = socket.socket(fileno=taken[1].detach())
    threads.append(threading.Thread(target=serve, args=(client,)))
    threads[-1].start()
