"""Sends what no worker should before READY and with each connection: words, and descriptors."""

import os
import socket

from plain import answer, say, take

NONSENSE = (
    b"",
    b"\xff\xfe=\0",
    b"=",
    b"READY",
    b"READY=2",
    "EXTEND_TIMEOUT_USEC=\u00b2".encode(),
    b"EXTEND_TIMEOUT_USEC=-1",
    b"EXTEND_TIMEOUT_USEC=" + b"9" * 400,
    b"BARRIER=1",
    b"STATUS=\x1b[2J\nMAINPID=1",
    b"x" * 60_000,
)


def send_nonsense() -> None:
    address = os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        for message in NONSENSE:
            for count in (0, 1, 2, 250):
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"\0\0\0\0" * count)]
                notify.sendmsg([message], rights if count else [], 0, address)


send_nonsense()
say(b"READY=1")
while taken := take():
    send_nonsense()
    with taken[1] as client:
        answer(client)
