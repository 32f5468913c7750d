"""Starts a Python program without a new interpreter: forked from one that has it loaded.

Half of what a start costs is the interpreter and the imports, and most tests start something.
So one process of each test process imports the programs, and forks for each start; CLONE_PARENT
makes what it forks a child of the test.  What runs then is the program itself, from its first
line, in a process of its own, with only what it was given: descriptors, environment, directory.
Where a start depends on how an interpreter begins, a real one is begun.

Source: clone(2); PyOS_AfterFork_Child of Python's C API; subprocess.Popen._execute_child, which
is the same from CPython 3.11 to 3.14.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import platform
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parent.parent)
_CLONE_PARENT = 0x00008000
_SYSCALL = {"x86_64": 56}.get(platform.machine())
#: What an interpreter reads before it runs anything, or its dynamic linker.
_EARLY = ("PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "TZ")
#: What may be forked, and what is loaded before its first fork beside what all have.
_MODULES: dict[str, tuple[str, ...]] = {
    "socketprotector": (),
    "socketprotector.ctl": (),
    "socketprotector_exporter": tuple(
        f"socketprotector_exporter.{each}" for each in ("agent", "http", "web")
    ),
}
#: Runs one of these so that it finds no other test's protectors.
ALONE = str(Path(__file__).with_name("unit") / "alone.py")
#: Loaded before the first fork; getaddrinfo() of a name loads the codec.
_LOADED = (
    "encodings.idna",
    "socketprotector.launch.cli",
    "socketprotector.launch.config_file",
    *(f"socketprotector.ctl.{each}" for each in ("orders", "queries", "reload", "top", "upgrade")),
)
_MESSAGE_BYTES = 1 << 20


def popen(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a command as Popen does, by a fork where that makes no difference."""
    kind = _Forked if _can(command, options) else subprocess.Popen
    return kind(command, **options)


def _early(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_EARLY)}


def _can(command: Sequence[str], options: dict[str, Any]) -> bool:
    words = [*map(str, command[:3]), "", ""]
    unlike = {"preexec_fn", "user", "group", "extra_groups", "executable"}
    environment = options.get("env")
    return (
        _SYSCALL is not None
        and words[0] == sys.executable
        and words[1] in ("-m", ALONE)
        and words[2] in _MODULES
        and unlike.isdisjoint(options)
        and (environment is None or _early(dict(environment)) == _early(dict(os.environ)))
    )


class _Source:
    """The process that forks."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE_BYTES)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        atexit.register(self.end)

    def fork(self, message: dict[str, Any], descriptors: Sequence[int]) -> int:
        rights = array.array("i", descriptors)
        self._ours.sendmsg(
            [json.dumps(message).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        )
        return int(self._ours.recv(32))

    def end(self) -> None:
        self._ours.close()
        self.process.wait()


_sources: list[_Source] = []


def begin() -> None:
    """Have the source load what it forks from; it ends with this process."""
    if _SYSCALL is not None and not _sources:
        _sources.append(_Source())


def source() -> set[int]:
    """Return the pid of what forks, which is a child of this process all the time."""
    return {each.process.pid for each in _sources}


class _Forked(subprocess.Popen[Any]):
    def _execute_child(self, args: Any, *rest: Any) -> None:
        """Do what Popen does here: start it, and close the child's ends of pipes."""
        (_, _, _, pass_fds, cwd, env, _, _, _, *pipes) = rest[:15]
        (*_, umask, new_session, _) = rest
        begin()
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        standard = [fd if fd >= 0 else n for n, fd in enumerate((p2cread, c2pwrite, errwrite))]
        if umask < 0:
            umask = os.umask(0)
            os.umask(umask)
        message = {
            "argv": [os.fspath(each) for each in args],
            "cwd": os.fspath(cwd) if cwd else os.getcwd(),
            "env": dict(os.environ if env is None else env),
            "session": bool(new_session),
            "umask": umask,
            "places": [0, 1, 2, *pass_fds],
        }
        self.pid = _sources[0].fork(message, [*standard, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _fork() -> int:
    """Fork a child of our parent."""
    python, libc = ctypes.pythonapi, ctypes.PyDLL(None)
    python.PyOS_BeforeFork()
    pid = int(libc.syscall(_SYSCALL, _CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0))
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    return pid


def _become(message: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Be the process that was asked for, as if it had been executed."""
    places = message["places"]
    # Out of the way of one another first.
    top = 1 + max(*places, *descriptors)
    for place, fd in zip(
        places, [fcntl.fcntl(each, fcntl.F_DUPFD, top) for each in descriptors], strict=True
    ):
        os.dup2(fd, place, inheritable=True)
    for fd in {*range(2 * top + len(places))} - {*places}:
        with suppress(OSError):
            os.close(fd)
    if message["session"]:
        os.setsid()
    os.umask(message["umask"])
    os.chdir(message["cwd"])
    os.environ.clear()
    os.environ.update(message["env"])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())  # type: ignore[union-attr]
    words = sys.orig_argv = message["argv"]
    try:
        if words[1] == "-m":
            sys.argv = words[2:]
            sys.path[0] = message["cwd"]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words[1:]
            sys.path[0] = os.path.dirname(words[1])
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise  # a message, which the interpreter writes
        _end(end.code or 0)
        raise
    _end(0)


def _end(status: int) -> None:
    """End as the interpreter does, but without freeing each object: that took most of a short run.

    Returns where the interpreter has an error of a stream to report.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return
    os._exit(status & 0xFF)


def _load(names: Sequence[str]) -> None:
    """Import what is not there yet, and keep the collector off its pages, which forks share."""
    new = [name for name in names if name not in sys.modules]
    for name in new:
        importlib.import_module(name)
    if new:
        gc.collect()
        gc.freeze()


def main() -> None:
    """Fork for each message, until the other end is closed."""
    sys.path.append(str(Path(ROOT, "exporter")))  # as pytest has it
    _load(_LOADED)
    with suppress(ModuleNotFoundError):  # on a system without the developers' tools
        from tests import answers

        answers.check_clients()
    requests = socket.socket(fileno=int(sys.argv[1]))
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, _MESSAGE_BYTES, 64)
        if not data:
            return
        message = json.loads(data)
        _load(_MODULES[message["argv"][2]])
        pid = _fork()
        if pid == 0:
            _become(message, descriptors)
            return
        for fd in descriptors:
            os.close(fd)
        requests.send(str(pid).encode())


if __name__ == "__main__":
    main()
