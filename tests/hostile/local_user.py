"""Run as another user: try all that a user may try on files, sockets and processes of others.

Arguments: JSON lists of paths, of pids and of abstract sockets' names, and a folder of its own.
Say in JSON what has succeeded, as [act, path or pid], and hold all locks and descriptors until
stdin ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

PTRACE_SEIZE = 0x4206
SYS_PIDFD_GETFD = 438
libc = ctypes.CDLL(None, use_errno=True)
held: list[int] = []


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")


def opened(path: str, flags: int) -> int:
    held.append(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC))
    return held[-1]


def lock(path: str) -> None:
    """Hold a shared lock, or better an exclusive one."""
    fd = opened(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def rename(path: str) -> None:
    """Away, and back."""
    os.rename(path, f"{path}.old")
    os.rename(f"{path}.old", path)


def connect(path: str, kind: int) -> None:
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as one:
        one.connect(path)
        one.send(b"READY=1\n")


def bind(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path)


def swap(path: str) -> None:
    """Exchange two names: renameat2(RENAME_EXCHANGE)."""
    checked(libc.renameat2(-100, path.encode(), -100, own("swap").encode(), 2))


def own(name: str) -> str:
    """Make a file of one's own, and return its path."""
    made = f"{OWN}/{name}-{len(os.listdir(OWN))}"
    Path(made).touch()
    return made


def through_proc(pid: int) -> None:
    """Open anything that a process has open: a memfd, a pipe, a file."""
    reached = False
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # a socket cannot be opened so
            opened(f"/proc/{pid}/fd/{fd}", os.O_RDONLY)
            reached = True
    checked(0 if reached else -1)


#: On a path.
ACTS: dict[str, Callable[[str], object]] = {
    "read": lambda path: opened(path, os.O_RDONLY),
    "write": lambda path: opened(path, os.O_WRONLY),
    "append": lambda path: opened(path, os.O_WRONLY | os.O_APPEND),
    "list": os.listdir,
    "lock": lock,
    "connect": lambda path: connect(path, socket.SOCK_STREAM),
    "connect datagram": lambda path: connect(path, socket.SOCK_DGRAM),
    "connect packets": lambda path: connect(path, socket.SOCK_SEQPACKET),
    "link": lambda path: os.link(path, own("x") + "-link"),
    "change the mode": lambda path: os.chmod(path, 0o777),
    "change the owner": lambda path: os.chown(path, os.getuid(), os.getgid()),
    "change the times": lambda path: os.utime(path, (1, 1)),
    "truncate": lambda path: os.truncate(path, 0),
    "set an attribute": lambda path: os.setxattr(path, "user.x", b"1"),
    "fill": lambda path: Path(f"{path}/filled").write_bytes(b"x" * 4096),
    "link into": lambda path: os.symlink("/etc/passwd", f"{path}/a-link"),
    "make a folder": lambda path: os.mkdir(f"{path}/a-folder"),
    "make a FIFO": lambda path: os.mkfifo(f"{path}/a-fifo"),
    "bind": lambda path: bind(f"{path}/a-socket"),
    "rename over": lambda path: os.rename(own("over"), path),
    "exchange": swap,
    "rename": rename,
    "remove": os.unlink,
}
#: On a process.
TO_PROCESSES: dict[str, Callable[[int], object]] = {
    "signal": lambda pid: os.kill(pid, 0),
    "signal a pidfd": lambda pid: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGCONT),
    "take a descriptor": lambda pid: checked(
        libc.syscall(SYS_PIDFD_GETFD, os.pidfd_open(pid), 0, 0)
    ),
    "trace": lambda pid: checked(libc.ptrace(PTRACE_SEIZE, pid, None, None)),
    "read the memory": lambda pid: opened(f"/proc/{pid}/mem", os.O_RDONLY),
    "read the environment": lambda pid: opened(f"/proc/{pid}/environ", os.O_RDONLY),
    "use its descriptors": through_proc,
    "lower its limits": lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE, (1, 1)),
    "slow it down": lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 19),
    "be killed before it": lambda pid: Path(f"/proc/{pid}/oom_score_adj").write_text("1000"),
}


def succeeded(paths: list[str], pids: list[int]) -> Iterator[tuple[str, str | int]]:
    for each, act in ACTS.items():
        for path in paths:
            with contextlib.suppress(OSError):
                act(path)
                yield each, path
    for each, to_process in TO_PROCESSES.items():
        for pid in pids:
            with contextlib.suppress(OSError):
                to_process(pid)
                yield each, pid


def connects(names: list[str]) -> Iterator[str]:
    """Yield those abstract names to which one can connect."""
    for name in names:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
            with contextlib.suppress(OSError):
                connect("\0" + name[1:], kind)
                yield name


if __name__ == "__main__":
    OWN = sys.argv[4]
    done = [*succeeded(json.loads(sys.argv[1]), json.loads(sys.argv[2]))]
    reached = [("connect", name) for name in connects(json.loads(sys.argv[3]))]
    print(json.dumps([*done, *reached]), flush=True)
    select.select([sys.stdin], [], [])
