"""shares.py PROCESSES [WAY]: serve in forked children, one line a connection: [PID] and the line.

`wait PATH` waits for a fifo, `grow` takes 80 MB, `hang` never answers, `log` logs the line.
WAY: `fails` in a child before it serves, `threads`, `raw` or `native` ones at the fork,
`grandchild` in each child, `handles` TERM.  While a file exists: `exits PATH` in a child before it
serves, `scarce PATH` of processes.
"""

import ctypes
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from _thread import start_new_thread
from typing import Any

from socketprotector_client import post_fork, serve

logging.basicConfig(format="%(levelname)s %(message)s")
log = logging.getLogger("shares")
kept: list[bytes] = []
count, way, path = int(sys.argv[1]), "".join(sys.argv[2:3]), "".join(sys.argv[3:])
fork = os.fork


def talk(client: Any, peer: object) -> None:
    with client.makefile("rb") as lines:
        for line in lines:
            words = line.split()
            if words[0] == b"wait":
                with open(words[1], "rb") as gate:
                    gate.read()
            elif words[0] == b"grow":
                kept.append(b"x" * 80_000_000)
            elif words[0] == b"hang":
                time.sleep(3600)
            elif words[0] == b"log":
                log.warning("%s", line.decode().strip())
            client.sendall(b"[%d] %s" % (os.getpid(), line))


@post_fork
def begin(number: int) -> None:
    print(f"child {number} begins, {os.environ['SOCKETPROTECTOR_CHILD']}", flush=True)
    if way == "fails" and number == 1:
        raise ValueError("no database")
    if way == "exits" and os.path.exists(path):
        sys.exit(0)
    if way == "grandchild":
        subprocess.Popen(["sleep", "3600"])


def fork_unless_scarce() -> int:
    if os.path.exists(path):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fork()


if way == "scarce":
    os.fork = fork_unless_scarce
if way == "handles":
    signal.signal(
        signal.SIGTERM, lambda *_: print(f"{os.getpid()} handles TERM", file=sys.stderr, flush=True)
    )
if way == "raw":
    start_new_thread(lambda: time.sleep(3600), ())
if way == "threads":
    threading.Thread(target=threading.Event().wait, name="metrics", daemon=True).start()
if way == "native":
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    for _ in range(2):  # these wait for ever
        libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.pthread_mutex_lock, mutex)
serve(talk, threads=1, processes=count)
