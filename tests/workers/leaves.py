"""Fails its start, and leaves a process in another session, without an environment.

    leaves.py [--ready] [--holds WHAT] [--stubborn] [--hidden] [--quiet]

The process holds the socket from which workers take connections.  If that is a listening socket, it
answers each client with `leftover`.
--holds nothing: it has closed all of its descriptors.  --quiet: it takes nothing.
--ready: say READY=1 first, and go on until TERM; without it, exit with status 1.
--stubborn: it ignores TERM.  --hidden: no process of its user can see its descriptors.
Says `left=PID` on stderr once the process is there.
"""

import argparse
import os
import signal
import socket
import sys

LEFTOVER = """
import ctypes, os, select, signal, socket, sys
holds, stubborn, hidden, quiet, told = sys.argv[1:]
os.closerange(3 if holds == "nothing" else 4, int(told))
if stubborn == "True":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if hidden == "True":
    ctypes.CDLL(None).prctl(4, 0)
os.write(int(told), b"%d" % os.getpid())
os.close(int(told))
while holds == "nothing" or quiet == "True":
    signal.pause()
listener = socket.socket(fileno=3)
while True:
    select.select([listener], [], [])
    try:
        client, _ = listener.accept()
    except BlockingIOError:
        continue
    with client:
        client.sendall(b"leftover\\n")
"""

options = argparse.ArgumentParser()
options.add_argument("--ready", action="store_true")
options.add_argument("--holds", default="listener")
options.add_argument("--stubborn", action="store_true")
options.add_argument("--hidden", action="store_true")
options.add_argument("--quiet", action="store_true")
given = options.parse_args()

receive, send = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.set_inheritable(send, True)
        words = (given.holds, str(given.stubborn), str(given.hidden), str(given.quiet), str(send))
        os.execve(sys.executable, (sys.executable, "-S", "-E", "-c", LEFTOVER, *words), {})
    os._exit(0)
os.close(send)
os.write(2, b"left=%s\n" % os.read(receive, 20))
if given.ready:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
    signal.sigwait({signal.SIGTERM})
sys.exit(1)
