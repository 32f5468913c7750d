"""Answers one connection after the other, each with the number of its turn."""

import os

from plain import say, take

say(b"READY=1")
turn = 0
while taken := take():
    turn += 1
    with taken[1] as client:
        line = client.recv(65536).decode().rstrip("\n")
        client.sendall(b"[%d] %s, number %d\n" % (os.getpid(), line.encode(), turn))
