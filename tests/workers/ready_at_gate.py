"""Says READY once the FIFO it is given has been opened for writing; then waits to be drained."""

import sys

from plain import answer, say, take

with open(sys.argv[1], "rb"):
    pass
say(b"READY=1")
while taken := take():
    with taken[1] as client:
        answer(client)
