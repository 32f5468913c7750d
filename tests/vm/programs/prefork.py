"""A generic pre-fork server: a master, and children that accept: `[pid] line` for each line.

    prefork.py CHILDREN

TERM to the master: TERM to its children, and it waits for them.  TERM to a child: it ends after
the connection that it serves.  When the master is killed, its children go on.
"""

import os
import select
import signal
import socket
import sys


def _serve(listener: socket.socket) -> None:
    told, wake = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    poll = select.poll()
    for each in (told, listener.fileno()):
        poll.register(each, select.POLLIN)
    while told not in dict(poll.poll()):
        try:
            client, _ = listener.accept()
        except BlockingIOError:
            continue  # another one was quicker
        client.setblocking(True)
        with client, client.makefile("rwb") as lines:
            for line in lines:
                lines.write(b"[%d] %s" % (os.getpid(), line))
                lines.flush()


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    listener = socket.socket(fileno=3)
    listener.setblocking(False)
    children = []
    for _ in range(int(sys.argv[1])):
        if (pid := os.fork()) == 0:
            try:
                _serve(listener)
            finally:
                os._exit(0)
        children.append(pid)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
    signal.sigwait({signal.SIGTERM})
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    for pid in children:
        os.waitpid(pid, 0)


main()
