"""A pre-fork server as many are: a master that accepts nothing, and children that do.

    master.py [--ready after|notify] [--stubborn] VERSION [CHILDREN]

Answers each line of a connection with `[pid] VERSION`, until the client has closed.
TERM to the master is passed on to the children, which finish and end.  With --stubborn they
ignore it.  Says `child=PID` for each on stderr.
"""

import argparse
import os
import select
import signal
import socket

options = argparse.ArgumentParser()
options.add_argument("--ready", default="notify")
options.add_argument("--stubborn", action="store_true")
options.add_argument("version")
options.add_argument("children", type=int, nargs="?", default=2)
given = options.parse_args()


def serve() -> None:
    """Accept until TERM comes."""
    ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    if given.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # not before it is known
    listener = socket.socket(fileno=3)
    listener.setblocking(False)  # several share it: the second must not wait in accept()
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(ended, select.POLLIN)
    while True:
        if ended in [fd for fd, _ in poll.poll()]:
            os._exit(0)
        try:
            client, _ = listener.accept()
        except BlockingIOError:
            continue
        with client, client.makefile("rw") as stream:
            client.setblocking(True)
            for _ in stream:
                stream.write(f"[{os.getpid()}] {given.version}\n")
                stream.flush()


signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
children = []
for _ in range(given.children):
    child = os.fork()
    if child == 0:
        serve()
    children.append(child)
    os.write(2, b"child=%d\n" % child)
if given.ready == "notify":
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
signal.sigwait({signal.SIGTERM})
for child in children:
    os.kill(child, signal.SIGTERM)
for child in children:
    os.waitpid(child, 0)
