"""Says READY once something was written to the FIFO it is given, or its last writer has gone."""

import sys

from plain import answer, say, take

with open(sys.argv[1], "rb", 0) as gate:
    gate.read(1)
say(b"READY=1")
while taken := take():
    with taken[1] as client:
        answer(client)
