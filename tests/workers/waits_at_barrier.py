"""Says READY and then waits, as sd_notify_barrier(3) does, until that was handled."""

import os
import select
import socket
import sys

from plain import answer, say, take

say(b"READY=1")
receive, send = os.pipe()
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, send.to_bytes(4, sys.byteorder))]
    address = os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1)
    notify.sendmsg([b"BARRIER=1"], rights, 0, address)
os.close(send)
poll = select.poll()
poll.register(receive, 0)
poll.poll()  # until no process holds the other end
os.write(2, b"passed\n")
while taken := take():
    with taken[1] as client:
        answer(client)
