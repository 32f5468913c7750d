"""Accepts from the listener it was handed, and does its worst to it, named by its argument.

With a FIFO's path not before another process has opened that.

Each connection is a line and an answer, `[pid] line`.  Only KILL ends it.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

LISTENER = socket.socket(fileno=3)
SO_ATTACH_FILTER, SO_LOCK_FILTER, SO_ATTACH_REUSEPORT_CBPF = 26, 44, 51
#: As often as it is wanted; the protector must not be kept busy by it.
AGAIN_S = 0.01


def attach(option: int, returned: int) -> None:
    """Attach a program of one instruction that returns this."""
    code = array.array("B", struct.pack("HBBI", 0x06, 0, 0, returned))
    program = struct.pack("HP", 1, code.buffer_info()[0])
    with contextlib.suppress(PermissionError):  # some kernels grant no filter to other users
        LISTENER.setsockopt(socket.SOL_SOCKET, option, program)


def shuts_it_down() -> None:
    LISTENER.shutdown(socket.SHUT_RDWR)


def shuts_it_down_for_reading() -> None:
    """As the stop() of some libraries does."""
    LISTENER.shutdown(socket.SHUT_RD)


def shuts_it_down_again_and_again() -> None:
    def attack() -> None:
        while True:
            with contextlib.suppress(OSError):
                LISTENER.shutdown(socket.SHUT_RDWR)
            time.sleep(AGAIN_S)

    threading.Thread(target=attack, daemon=True).start()


def listens_again() -> None:
    """So it stands last in the group, without telling the protector."""
    LISTENER.shutdown(socket.SHUT_RDWR)
    LISTENER.listen(1)


def leaves_it_half_shut() -> None:
    """Who is accepted by it is shut down from the beginning."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            LISTENER.shutdown(socket.SHUT_RDWR)
    LISTENER.listen(1)


def closes_it() -> None:
    """Its process lives on, and accepts no more."""
    os.close(LISTENER.detach())


def drops_clients_in_the_kernel() -> None:
    attach(SO_ATTACH_FILTER, 0)


def drops_them_and_locks_that() -> None:
    attach(SO_ATTACH_FILTER, 0)
    LISTENER.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)


def steers_clients_astray() -> None:
    for place in (1, 0):
        with contextlib.suppress(OSError):
            attach(SO_ATTACH_REUSEPORT_CBPF, place)


def turns_every_switch() -> None:
    fcntl.fcntl(LISTENER, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        LISTENER.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", 0, 1))
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF, socket.SO_REUSEPORT, socket.SO_REUSEADDR):
        LISTENER.setsockopt(socket.SOL_SOCKET, option, 0)
    LISTENER.listen(0)


def serve(client: socket.socket) -> None:
    client.settimeout(None)
    with client, client.makefile("rw") as stream, contextlib.suppress(OSError):
        line = stream.readline()
        if line:
            stream.write(f"[{os.getpid()}] {line}")


signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGIO, signal.SIG_IGN)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))


def attacks() -> None:
    attack: Callable[[], None] = globals()[sys.argv[1]]
    for gate in sys.argv[2:]:
        open(gate).close()
    attack()
    os.write(2, b"done\n")


# Not before the protector has taken it for ready, and serves by it.
threading.Timer(0.2, attacks).start()
while True:
    try:
        accepted, _ = LISTENER.accept()
    except OSError:
        time.sleep(AGAIN_S)
        continue
    threading.Thread(target=serve, args=(accepted,), daemon=True).start()
