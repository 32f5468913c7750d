"""An unmodified server: accepts from the listeners that LISTEN_FDS names, and knows no channel.

    accepts.py [--ready notify|ack|yaml|path|N|never] [--gate FIFO] [WORD...]

Each connection is a line and an answer: `env NAME`, `fds`, `words`, `wait FIFO`, else `[pid] line`.
TERM and QUIT: no more accepting, an answer to who is connected, exit.
"""

import argparse
import os
import select
import signal
import socket
import sys

options = argparse.ArgumentParser()
options.add_argument("--ready", default="notify")
options.add_argument("--gate")
options.add_argument("words", nargs="*")
given = options.parse_args()

count = int(os.environ["LISTEN_FDS"]) if os.environ.get("LISTEN_PID") == str(os.getpid()) else 0
ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
for number in (signal.SIGTERM, signal.SIGQUIT):
    signal.signal(number, lambda *_: None)
listeners = {}
for fd in range(3, 3 + count):
    os.set_blocking(fd, False)  # several share it: the second must not wait in accept()
    listeners[fd] = socket.socket(fileno=fd)


def say_ready(how: str) -> None:
    pid = os.getpid()
    if how == "notify":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
    elif how == "ack":
        line = b'{"command":"worker:ack", "pid":%d}\n' % pid
        os.write(int(os.environ["EINHORN_SOCK_FD"]), line)
    elif how == "yaml":
        line = b"---%%0Acommand: worker:ack%%0Apid: %d%%0A\n" % pid
        os.write(int(os.environ["EINHORN_SOCK_FD"]), line)
    elif how == "path":
        with socket.socket(socket.AF_UNIX) as told_there:
            told_there.connect(os.environ["EINHORN_SOCK_PATH"])
            told_there.sendall(b'{"command":"worker:ack", "pid":%d}\n' % pid)
            assert told_there.recv(1) == b""
    elif how.isdigit():
        os.write(int(how), b"up\n")
        os.close(int(how))


def answer(line: str) -> str:
    word, _, rest = line.partition(" ")
    if word == "env":
        return os.environ.get(rest, "-")
    if word == "fds":
        return " ".join(sorted(os.listdir("/proc/self/fd"), key=int))
    if word == "words":
        return " ".join(given.words)
    if word == "wait":
        with open(rest, "rb") as gate:
            gate.read()
    return f"[{os.getpid()}] {line}"


def serve(client: socket.socket) -> None:
    with client, client.makefile("rw") as stream:
        line = stream.readline()
        if line:
            stream.write(answer(line.rstrip("\n")) + "\n")


if given.gate:
    with open(given.gate, "rb") as gate:
        gate.read()
say_ready(given.ready)
poll = select.poll()
for fd in (ended, *listeners):
    poll.register(fd, select.POLLIN)
while True:
    ready = [fd for fd, _ in poll.poll()]
    if ended in ready:
        sys.exit(0)
    for fd in ready:
        try:
            client, _ = listeners[fd].accept()
        except BlockingIOError:
            continue
        client.setblocking(True)
        serve(client)
