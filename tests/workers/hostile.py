"""Says that it is ready and then does its worst, named by its argument; takes no connection.

Only KILL ends it.  A worker of another slot than the first is a good one, many.py.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator

if os.environ["SOCKETPROTECTOR_WORKER"] != "0":
    good = os.path.join(os.path.dirname(__file__), "many.py")
    os.execv(sys.executable, [sys.executable, "-S", "-E", good])

from plain import CHANNEL, say

ADDRESS = os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1)
RETURN = socket.socket(fileno=int(os.environ["SOCKETPROTECTOR_RETURN"]))
PROTECTOR = os.getppid()
SO_PEEK_OFF = 42
LONG_S = 600
#: What is written to files is bounded: they are in memory.
MUCH = 16 << 20


def rights(fds: list[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]


def until_heard() -> None:
    """Wait until the protector has handled what was said: one that ends before was never ready."""
    heard, held = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.sendmsg([b"BARRIER=1"], rights([held]), 0, ADDRESS)
    os.close(held)
    os.read(heard, 1)
    os.close(heard)


@contextlib.contextmanager
def lingering() -> Iterator[int]:
    """A socket whose close() waits for ten minutes: its peer reads nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(listener.getsockname())
    with listener, listener.accept()[0], ours:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(b"x" * 65536)
        ours.setblocking(True)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LONG_S))
        yield ours.detach()
        signal.pause()  # the peer stays


@contextlib.contextmanager
def standing_still() -> Iterator[None]:
    """While this lasts the protector does nothing, so that its copy becomes the last one."""
    os.kill(PROTECTOR, signal.SIGSTOP)
    yield
    os.kill(PROTECTOR, signal.SIGCONT)


def floods_notify() -> None:
    """Speaks without end, from a process of its own too."""
    os.fork()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(ADDRESS)
        while True:
            notify.send(b"READY=1\nSTATUS=" + b"x" * 3000)


def floods_descriptors() -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(250)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(ADDRESS)
        while True:
            notify.sendmsg([b"BARRIER=1"], rights(fds))
            notify.sendmsg([b"BARRIER=1"], rights(fds[:1]))


def sends_what_lingers() -> None:
    """Each message holds the last copy of a socket that is slow to close."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(ADDRESS)
        for message in (b"STATUS=x", b"BARRIER=1"):
            if os.fork() == 0:
                with lingering() as fd, standing_still():
                    notify.sendmsg([message], rights([fd]))
                    os.close(fd)


def sends_what_lingers_in_a_queue() -> None:
    """The last copy of a socket that is slow to close waits in another socket, which it sends."""
    if os.fork() == 0:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with lingering() as fd, standing_still():
            near.sendmsg([b"x"], rights([fd]))
            os.close(fd)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.connect(ADDRESS)
                notify.sendmsg([b"STATUS=x"], rights([far.fileno()]))
            near.close()
            far.close()


def returns_what_lingers() -> None:
    if os.fork() == 0:
        with lingering() as fd, standing_still():
            RETURN.sendmsg([b"x"], rights([fd]))
            os.close(fd)


def claims_what_is_not_its_own() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(ADDRESS)
        for name in ("sp.settings", "sp.state", "sp.listener.0"):
            message = f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0".encode()
            notify.sendmsg([message], rights([0]))
            notify.send(f"FDSTOREREMOVE=1\nFDNAME={name}".encode())
        for word in (
            *(
                "MAINPID=1",
                f"X_EXITED={PROTECTOR} 0",
                "EXIT_STATUS=0",
                "ERRNO=99999999999999999999",
            ),
            *("STOPPING=1", "RELOADING=1", "WATCHDOG=trigger", "WATCHDOG_USEC=1"),
            *("EXTEND_TIMEOUT_USEC=999999999999999", "NOTIFYACCESS=all", "READY=0"),
        ):
            notify.send(word.encode())


def floods_its_return_line() -> None:
    os.set_blocking(RETURN.fileno(), False)
    with contextlib.suppress(BlockingIOError):
        while True:
            RETURN.sendmsg([b"x" * 4096], rights([0] * 100))


def writes_to_the_channel() -> None:
    with contextlib.suppress(BrokenPipeError):
        CHANNEL.sendmsg([b"x" * 16], rights([0]), socket.MSG_DONTWAIT)
        say(b"STATUS=it could be written to")


def shuts_the_channel_down() -> None:
    CHANNEL.shutdown(socket.SHUT_RDWR)


def turns_every_switch() -> None:
    """All of these are the protector's too: the descriptions are shared."""
    for fd in (1, 2, CHANNEL.fileno(), RETURN.fileno()):
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF, SO_PEEK_OFF, socket.SO_RCVLOWAT):
        with contextlib.suppress(OSError):
            CHANNEL.setsockopt(socket.SOL_SOCKET, option, 8)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        CHANNEL.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", 0, 1))


def leaves_a_child_with_the_channel() -> None:
    """Its heir has a session of its own, and stays until the channel ends."""
    if os.fork():
        os._exit(0)
    os.setsid()
    CHANNEL.recv(1, socket.MSG_PEEK)  # a copy of each connection that comes first, too
    while CHANNEL.recv(16):
        pass
    os._exit(0)


def steals_connections() -> None:
    """Takes what is its generation's and never answers."""
    while CHANNEL.recvmsg(16, socket.CMSG_LEN(4))[0]:
        pass


def drops_connections_in_the_kernel() -> None:
    """A filter on the shared end throws away all that is sent."""
    drop = array.array("B", struct.pack("HBBI", 0x06, 0, 0, 0))
    CHANNEL.setsockopt(
        socket.SOL_SOCKET, 26, struct.pack("HP", 1, drop.buffer_info()[0])
    )  # SO_ATTACH_FILTER


def asks_for_credentials() -> None:
    """What then comes with a message leaves no room for its descriptor."""
    CHANNEL.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)


def says_the_worst() -> None:
    """Whatever may come in a datagram: too long, too many, no text, escapes, numbers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(ADDRESS)
        names = ("READY", "STATUS", "WATCHDOG", "EXTEND_TIMEOUT_USEC", "BARRIER", "MAINPID", "")
        values = (
            "",
            "1",
            "-1",
            "0",
            "9" * 4000,
            "\x1b]0;x\x07\r",
            "\0",
            "\ud800",
            "1e999",
            "\u00b2",
        )
        while True:
            for message in (b"", b"\n" * 60_000, b"=" * 60_000, b"\0" * 60_000, os.urandom(4096)):
                notify.send(message)
            for name in names:
                for value in values:
                    notify.send(f"{name}={value}".encode("utf-8", "surrogatepass"))
            notify.send("\n".join(f"N{n}={n}" for n in range(1000)).encode())


def writes_the_scoreboard() -> None:
    """Anything into it, and tries to make it smaller, larger and a hole."""
    fd = int(os.environ["SOCKETPROTECTOR_SCOREBOARD"].partition(":")[0])
    size = os.fstat(fd).st_size
    for wrong in (0, 1, 2 * size):
        with contextlib.suppress(PermissionError):
            os.ftruncate(fd, wrong)
            print("it could be resized", flush=True)
    with contextlib.suppress(OSError):  # FALLOC_FL_PUNCH_HOLE needs the system call itself
        os.posix_fallocate(fd, size, size)
        print("it could grow", flush=True)
    with mmap.mmap(fd, size) as board:
        while True:
            for piece in (b"\xff" * 8, b"\1" + bytes(7), os.urandom(8), bytes(8)):
                board[:] = piece * (size // 8)


def prints_a_line_without_end() -> None:
    for _ in range(MUCH // 65536):
        os.write(2, b"x" * 65536)
    os.write(2, b"\n")


def prints_lines_without_end() -> None:
    line = (
        b"\x1b[2J\0\xff 2026-01-01T00:00:00.000Z error event=resources-exhausted call=accept\r\n\n"
    )
    for _ in range(MUCH // len(line * 1000)):
        os.write(1, line * 1000)


def has_its_pipes_full() -> None:
    """As large as they can be, and made non-blocking, by a child of its own, too."""
    os.fork()
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, 1031, 1 << 20)  # F_SETPIPE_SZ
            os.set_blocking(fd, False)
            for _ in range(4):
                os.write(fd, b"x" * (1 << 20))
        os.set_blocking(fd, True)
    os.write(2, b"\n")


def leaves_a_child_with_its_pipes() -> None:
    """It is in a session of its own, where only a test ends it."""
    if os.fork() == 0:
        os.setsid()
        CHANNEL.close()
        RETURN.close()
        while True:
            signal.pause()


def calls_the_control_socket() -> None:
    """Again and again: ACKs, halves, floods, descriptors, and clients that read nothing."""
    path = sys.argv[2]
    status = b'{"v":1,"command":"status"}\n'
    sent = (
        *(b"", b"\n" * 60_000, b'{"command":"worker:ack","pid":1}\n', b"x" * 70_000),
        *(b"[" * 60_000 + b"\n", status * 1000, b'{"v":1,"command":"events"}\n', status[:-1]),
        *(b'{"v":' + b"9" * 60_000 + b"}\n", b"\0\xff\n" * 9000),
    )
    open_ones: list[socket.socket] = []
    while True:
        for message in sent:
            one = socket.socket(socket.AF_UNIX)
            one.setblocking(False)
            try:
                one.connect(path)
                one.send(message)
                one.sendmsg([b"{"], rights([0] * 100))
            except OSError:
                pass  # not for this user, full, or ended
            open_ones.append(one)
        for one in open_ones[:-100]:  # there are 256 places
            one.close()
        del open_ones[:-100]


def floods_its_ack_line() -> None:
    """The line on which einhorn's ACK is awaited."""
    with socket.socket(fileno=int(os.environ["EINHORN_SOCK_FD"])) as line:
        while True:
            for message in (
                b"\n" * 60_000,
                b'{"command":"worker:ack","pid":',
                b"[" * 60_000 + b"\n",
            ):
                line.sendall(message)


signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGIO, signal.SIG_IGN)
if "EINHORN_SOCK_FD" not in os.environ:  # else it is not ready, as it sends no ACK
    say(b"READY=1")
    until_heard()
attack: Callable[[], None] = globals()[sys.argv[1]]
attack()
os.write(2, b"done\n")
while True:
    signal.pause()
