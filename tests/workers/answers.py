"""Speaks HTTP, under --handoff listener without the client library and else with it.

    answers.py SAYS [--never] [--dies GATE] [--defers] [--resets]

SAYS is a file: what stands there, as `500 database gone`, is the answer to /healthz, read anew each
time; as long as it is empty or not there, none is given.  Every other path is `200 [pid]`.  A
request for /healthz is printed, with where it came from.  --never: connections are not accepted at
all.  --dies: it exits with status 7 when GATE, a FIFO, can be read.  --defers: it sets
TCP_DEFER_ACCEPT, as some servers do.  --resets: it resets each connection that it accepts.
"""

import argparse
import os
import select
import signal
import socket
import threading
from pathlib import Path

options = argparse.ArgumentParser()
options.add_argument("says", type=Path)
options.add_argument("--never", action="store_true")
options.add_argument("--dies")
options.add_argument("--defers", action="store_true")
options.add_argument("--resets", action="store_true")
given = options.parse_args()


def answer(one: socket.socket, address: object) -> None:
    try:
        if given.resets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return
        request = one.recv(65536).decode("latin-1")
        if not request:
            return
        path = request.split()[1]
        status, _, text = f"200 [{os.getpid()}]".partition(" ")
        if path.startswith("/healthz"):
            print("asked by", address, flush=True)
            while not (said := given.says.read_text().strip() if given.says.exists() else ""):
                if select.select([one], [], [], 0.05)[0]:
                    return  # it has waited for long enough
            status, _, text = said.partition(" ")
        one.sendall(f"HTTP/1.1 {status} -\r\n\r\n{text}\n".encode())
    except OSError:
        pass  # it has left
    finally:
        one.close()


def die(gate: str) -> None:
    with open(gate, "rb") as file:
        file.read()
    os._exit(7)


if given.dies:
    threading.Thread(target=die, args=(given.dies,), daemon=True).start()
if given.defers:
    with socket.socket(fileno=os.dup(3)) as listening:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
while given.never:
    signal.pause()
if "LISTEN_FDS" in os.environ:
    listening = socket.socket(fileno=3)
    listening.setblocking(True)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    while True:
        client, peer = listening.accept()
        threading.Thread(target=answer, args=(client, peer)).start()
else:
    from socketprotector_client import serve

    serve(answer, threads=8)
