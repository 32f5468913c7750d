"""Serves many connections at once: `[pid] line` for each line.

At end of file, and at TERM, it takes no more and finishes what it has.  `--silent`: another
process says READY for it.
"""

import _signal as signal
import _socket as socket
import os
import select
import sys

from plain import SOURCES, say, take

wake, wake_send = os.pipe2(os.O_NONBLOCK)
signal.set_wakeup_fd(wake_send)
signal.signal(signal.SIGTERM, lambda *_: None)
poll = select.epoll()
for each in SOURCES:
    poll.register(each, select.EPOLLIN)
poll.register(wake, select.EPOLLIN)
clients: dict[int, socket.socket] = {}
taking = True


def stop_taking() -> None:
    global taking
    if taking:
        taking = False
        for each in SOURCES:
            poll.unregister(each)


if "--silent" not in sys.argv:
    say(b"READY=1")
while taking or clients:
    for fd, _ in poll.poll():
        if fd == wake:
            os.read(wake, 64)
            stop_taking()
        elif fd in clients:
            try:
                data = clients[fd].recv(65536)
                if data:
                    clients[fd].sendall(b"[%d] %s" % (os.getpid(), data))
            except OSError:
                data = b""
            if not data:
                poll.unregister(fd)
                clients.pop(fd).close()
        elif taking:
            try:
                taken = take(socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            if taken is None:
                stop_taking()
            else:
                clients[taken[1].fileno()] = taken[1]
                poll.register(taken[1], select.EPOLLIN)
