"""An unmodified server: accepts from the listeners that LISTEN_FDS names, and knows no channel.

    accepts.py [--ready notify|ack|yaml|path|N|never] [--gate FIFO] [WORD...]

Each connection is a line and an answer: `env NAME`, `fds`, `words`, `wait FIFO`, else `[pid] line`.
TERM and QUIT: no more accepting, an answer to who is connected, exit.

For modules that stand for others see plain.py.
"""

import _signal as signal
import _socket as socket
import os
import select
import sys

words = sys.argv[1:]
given = {"--ready": "notify", "--gate": ""}
for name in given:
    if name in words:
        at = words.index(name)
        given[name] = words[at + 1]
        del words[at : at + 2]
words = words[words[:1] == ["--"] :]

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
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
        notify.close()
    elif how == "ack":
        line = b'{"command":"worker:ack", "pid":%d}\n' % pid
        os.write(int(os.environ["EINHORN_SOCK_FD"]), line)
    elif how == "yaml":
        line = b"---%%0Acommand: worker:ack%%0Apid: %d%%0A\n" % pid
        os.write(int(os.environ["EINHORN_SOCK_FD"]), line)
    elif how == "path":
        told_there = socket.socket(socket.AF_UNIX)
        told_there.connect(os.environ["EINHORN_SOCK_PATH"])
        told_there.sendall(b'{"command":"worker:ack", "pid":%d}\n' % pid)
        assert told_there.recv(1) == b""
        told_there.close()
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
        return " ".join(words)
    if word == "wait":
        with open(rest, "rb") as gate:
            gate.read()
    return f"[{os.getpid()}] {line}"


def serve(client: socket.socket) -> None:
    line = b""
    while not line.endswith(b"\n") and (data := client.recv(65536)):
        line += data
    if line:
        client.sendall((answer(line.decode().rstrip("\n")) + "\n").encode())
    client.close()


if given["--gate"]:
    with open(given["--gate"], "rb") as gate:
        gate.read()
say_ready(given["--ready"])
poll = select.poll()
for fd in (ended, *listeners):
    poll.register(fd, select.POLLIN)
while True:
    ready = [fd for fd, _ in poll.poll()]
    if ended in ready:
        sys.exit(0)
    for fd in ready:
        try:
            connection, _ = listeners[fd]._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            continue
        serve(socket.socket(fileno=connection))
