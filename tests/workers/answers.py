"""Speaks HTTP, under --handoff listener without the client library and else with it.

    answers.py SAYS [--never] [--dies GATE] [--defers] [--resets] [--tls FILE]

SAYS is a file: what stands there, as `500 database gone`, is the answer to /healthz, read anew each
time; as long as it is empty or not there, none is given.  Every other path is `200 [pid]`.  A
request for /healthz is printed, with where it came from.  --never: connections are not accepted at
all.  --dies: it exits with status 7 when GATE, a FIFO, can be read.  --defers: it sets
TCP_DEFER_ACCEPT, as some servers do.  --resets: it resets each connection that it accepts.
--tls: it speaks TLS, with the certificate and the key in FILE.
"""

import os
import select
import signal
import socket
import sys
import threading

# Without argparse and pathlib, which are half of its start.
says, *options = sys.argv[1:]
dies = options[options.index("--dies") + 1] if "--dies" in options else None
if "--tls" in options:
    import ssl

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(options[options.index("--tls") + 1])


def said() -> str:
    try:
        with open(says, encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def answer(one: socket.socket, address: object) -> None:
    try:
        if "--resets" in options:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return
        if "--tls" in options:
            one = tls.wrap_socket(one, server_side=True)
        request = one.recv(65536).decode("latin-1")
        if not request:
            return
        path = request.split()[1]
        status, _, text = f"200 [{os.getpid()}]".partition(" ")
        if path.startswith("/healthz"):
            print("asked by", address, flush=True)
            while not (found := said()):
                if select.select([one], [], [], 0.05)[0]:
                    return  # it has waited for long enough
            status, _, text = found.partition(" ")
        one.sendall(f"HTTP/1.1 {status} -\r\n\r\n{text}\n".encode())
    except OSError:
        pass  # it has left
    finally:
        one.close()


def die(gate: str) -> None:
    with open(gate, "rb") as file:
        file.read()
    os._exit(7)


if dies is not None:
    threading.Thread(target=die, args=(dies,), daemon=True).start()
if "--defers" in options:
    with socket.socket(fileno=os.dup(3)) as listening:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
while "--never" in options:
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
