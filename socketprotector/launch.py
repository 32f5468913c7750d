"""From a parsed command line to a resident process: detach, pid file, exec.

Runs in the launching process.  In the foreground that process becomes the resident one;
otherwise it waits, and leaves with the verdict of the first start.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence

from daemon import DaemonContext
from lockfile import AlreadyLocked

from . import door
from .address import Bound
from .errors import AlreadyRunning, Refusal, SystemRefused
from .pidfile import PidFile
from .settings import Settings, dump

_INTERRUPTED = 130


def launch(settings: Settings, bound: Sequence[Bound], label: Sequence[str]) -> int:
    """Start the resident process with the bound sockets; takes ownership of them.

    label: words that `ps` shows behind the program.  Returns the exit status of the
    command once the first generation serves or has failed; in the foreground it does not
    return.  Raises Refusal.
    """
    log = _open_log(settings.log_file)
    if settings.foreground:
        _become_resident(settings, bound, label, log, None)
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        try:
            _become_resident(settings, bound, label, log, theirs)
        except BaseException as error:
            status = error.status if isinstance(error, Refusal) else SystemRefused.status
            _discard(bound)
            theirs.sendall(json.dumps({"failed": str(error), "status": status}).encode() + b"\n")
        finally:
            os._exit(1)
    theirs.close()
    # From here on they are the child's, files included.
    for each in bound:
        each.socket.close()
    os.waitpid(child, 0)  # the first of the two forks ends at once
    return _wait(ours)


def _discard(bound: Sequence[Bound]) -> None:
    for each in bound:
        try:
            each.discard()
        except OSError:
            pass


def _open_log(path: str | None) -> int | None:
    if path is None:
        return None
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return os.open(path, flags, 0o640)
    except OSError as error:
        raise SystemRefused(
            f"cannot write the log file {path}: {error.strerror}; check the folder and its rights"
        ) from error


def _become_resident(
    settings: Settings,
    bound: Sequence[Bound],
    label: Sequence[str],
    log: int | None,
    launcher: socket.socket | None,
) -> None:
    """Detach unless in the foreground, take the pid file, and exec.  Returns only by raising."""
    pid_file = PidFile(settings.pid_file) if settings.pid_file is not None else None
    detach = launcher is not None
    kept = [each.socket.fileno() for each in bound]
    if launcher is not None:
        kept.append(launcher.fileno())
    # None is /dev/null to it; in the foreground all three stay what they are.
    # ruff: noqa: SIM115 -- they stay open for the life of the daemon
    standard = [None if detach else open(fd, "r+b", 0, closefd=False) for fd in (0, 1, 2)]
    if log is not None:
        standard[1:] = [open(log, "ab", 0)] * 2
    context = DaemonContext(
        pidfile=pid_file,
        detach_process=detach,
        files_preserve=kept,
        umask=settings.umask,
        prevent_core=False,
        signal_map={},
        stdin=standard[0],
        stdout=standard[1],
        stderr=standard[2],
    )
    try:
        context.open()
    except AlreadyLocked as error:
        raise AlreadyRunning(
            f"the pid file {settings.pid_file} is {error}; stop or reload that one"
        ) from error
    except OSError as error:
        raise SystemRefused(
            f"cannot write the pid file {settings.pid_file}: {error.strerror}; "
            "check the folder and its rights"
        ) from error
    try:
        _exec(settings, bound, label, pid_file, launcher)
    except OSError as error:
        if pid_file is not None:
            pid_file.release()
        raise SystemRefused(f"cannot execute {error.filename}: {error.strerror}") from error


def _exec(
    settings: Settings,
    bound: Sequence[Bound],
    label: Sequence[str],
    pid_file: PidFile | None,
    launcher: socket.socket | None,
) -> None:
    descriptors = {door.SETTINGS: os.memfd_create(door.SETTINGS, os.MFD_CLOEXEC)}
    os.write(descriptors[door.SETTINGS], dump(settings))
    for index, each in enumerate(bound):
        descriptors[f"{door.LISTENER}{index}"] = each.socket.fileno()
    if launcher is not None:
        descriptors[door.LAUNCHER] = launcher.fileno()
    if pid_file is not None:
        descriptors[door.PID_FILE] = pid_file.fd
    # Where a standard descriptor was closed before, /dev/null came there as close-on-exec.
    for fd in (0, 1, 2):
        os.set_inheritable(fd, True)
    # A signal between the exec and the new handlers would kill; so it waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    environment = {**os.environ, **door.leave(descriptors)}
    os.execve(sys.executable, [sys.executable, "-P", "-m", "socketprotector", *label], environment)


def _wait(line: socket.socket) -> int:
    """Wait for the verdict; Ctrl-C (or TERM) ends the start and waits for its end."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pid = 0
    try:
        with line.makefile("rb") as lines:
            for data in lines:
                words = json.loads(data)
                pid = words.get("pid", pid)
                if words.get("ready"):
                    return 0
                if "failed" in words:
                    _wait_for_end(pid)
                    print(f"SocketProtector: {words['failed']}", file=sys.stderr)
                    return int(words["status"])
    except KeyboardInterrupt:
        line.shutdown(socket.SHUT_RDWR)
        line.close()
        _wait_for_end(pid)
        print("SocketProtector: interrupted; nothing was started", file=sys.stderr)
        return _INTERRUPTED
    _wait_for_end(pid)
    print(
        "SocketProtector: the protector ended before anything served; see its log", file=sys.stderr
    )
    return SystemRefused.status


def _wait_for_end(pid: int) -> None:
    """Wait until a process that is not our child has ended."""
    if pid:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
        os.close(pidfd)
