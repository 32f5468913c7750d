"""Starts the resident process: detaches, takes the pid file, and executes the resident program.

This runs in the launching process.  In the foreground, the launching process becomes the resident
process.  Otherwise the launching process waits (await_verdict.py), and exits with the verdict of
the first start.
Signals stay blocked until the waiting process, or the resident process, can handle them.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace

from daemon import DaemonContext
from daemon import daemon as python_daemon

from ..model.errors import NO_PROCESSES, Refusal, SystemRefused, what_failed
from ..model.settings import Settings, dump
from ..model.text import escape
from ..programs import guard
from ..system import inherited, privileges, socket_file
from ..system.cleanup import on_error
from ..system.executable import command_of, need_descriptors
from ..system.log_file import open_log
from ..system.terminal import tell
from . import notify_dir
from .await_verdict import begin, file_identity, say, socket_identity, wait
from .bind import Bound, discard_all
from .bind_control import bind_control
from .pid_file import PidFile, hint
from .rights import Rights

_close_all = python_daemon.close_all_open_files


def _close_open(exclude: Collection[int]) -> None:
    """Close all open descriptors except these.

    python-daemon tries all numbers up to the hard limit, which may be a billion.  Without
    close_range(2) in libc, as with musl, that takes minutes.
    """
    try:
        found = os.listdir("/proc/self/fd")
    except OSError:  # no /proc, or no free descriptor
        _close_all(exclude=exclude)
        return
    for fd in {*map(int, found)} - {*exclude}:
        os.closerange(fd, fd + 1)


python_daemon.close_all_open_files = _close_open


def launch(settings: Settings, bound: Mapping[str, Bound]) -> int:
    """Start the resident process with the bound sockets; this function owns the sockets.

    Returns the exit status once the first generation is serving or has failed.  In the foreground
    this function does not return.  Raises Refusal.
    bound: the sockets, by the names under which the resident process inherits them.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    with on_error(signal.pthread_sigmask, signal.SIG_SETMASK, mask):
        log = _open_log(settings)
        if settings.foreground:
            try:
                terminal = os.dup(2)
            except OSError as error:
                raise SystemRefused(f"cannot start: {what_failed(error)}") from error
            with on_error(os.dup2, terminal, 2):  # an error belongs on the terminal, not in the log
                _become_resident(settings, bound, log, terminal)
        # Our caller may ignore SIGCHLD.  Then the kernel would reap the child before we do.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            parent_end, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            told, telling = os.pipe()
            child = os.fork()  # because DaemonContext.open() ends the process that calls it
        except OSError as error:  # no descriptor or process is available (RLIMIT_NPROC)
            raise _cannot_detach(error) from error
    if child == 0:
        parent_end.close()
        os.close(told)
        # While WATCHDOG_PID names the launching process, the resident process would not send
        # WATCHDOG=1.
        if os.environ.get("WATCHDOG_PID") == str(os.getppid()):
            del os.environ["WATCHDOG_PID"]
        try:
            _become_resident(settings, bound, log, child_end.fileno(), telling)
        except BaseException as error:
            discard_all(bound.values())
            if isinstance(error, Refusal):
                say(telling, failed=escape(str(error)), status=error.status)
            else:
                reason = f"cannot start: {what_failed(error)}"
                say(telling, failed=reason, status=SystemRefused.status)
        finally:
            os._exit(1)
    child_end.close()
    os.close(telling)
    # The child now owns the sockets and their files.
    for each in bound.values():
        each.socket.close()
    os.waitpid(child, 0)  # the child ends at once: DaemonContext forks again
    try:
        with parent_end:
            return wait(parent_end, told, settings.log_file or "syslog")
    except OSError as error:
        # The connection is closed, so the resident process cancels the start.
        raise SystemRefused(f"cannot wait for the start: {what_failed(error)}") from error


def _cannot_detach(error: OSError) -> SystemRefused:
    # The error of DaemonContext has no errno, but a cause.
    no_process = isinstance(error.__cause__ or error, BlockingIOError)
    return SystemRefused(f"cannot detach: {NO_PROCESSES if no_process else what_failed(error)}")


def _open_log(settings: Settings) -> int | None:
    path = settings.log_file
    if path is None:
        return None
    try:
        return open_log(path, settings.identity)
    except OSError as error:
        raise SystemRefused(
            f"cannot write the log file {path}: {error.strerror}; {hint(error, 'the folder')}"
        ) from error


def _become_resident(
    settings: Settings,
    bound: Mapping[str, Bound],
    log: int | None,
    verdict: int,
    telling: int | None = None,
) -> None:
    """Detach (without -f), take the pid file, and exec.  Never returns.  Raises Refusal.

    verdict: the descriptor for the outcome.  With -f this is the terminal; otherwise this is the
    connection to the launching process.
    telling: without -f, the pipe to the launching process, which the exec closes.
    """
    pid_file = PidFile(settings.pid_file) if settings.pid_file is not None else None
    kept = [verdict, *(each.socket.fileno() for each in bound.values())]
    if telling is not None:
        kept.append(telling)
    context = _context(settings, pid_file, kept, log)
    try:
        context.open()
    except OSError as error:
        raise _cannot_detach(error) from error
    with ExitStack() as made:  # undone only after a failure, because a success ends in exec
        made.callback(context.close)  # removes the pid file; a second close() does nothing
        if pid_file is not None and settings.identity is not None:
            # socketprotectorctl compares the owner with the protector's user, who can write the
            # file after the exec anyway.
            os.fchown(pid_file.fd, settings.identity.uid, -1)
        # Make the files below only now: of several simultaneous starts, only one has the pid file.
        notices: list[str] = []
        control = bind_control(settings, notices.append)
        if control is not None:
            made.callback(control.discard)
        settings = replace(settings, control=control.settings if control else None)
        bound = {**bound, **({inherited.CONTROL: control} if control else {})}
        folder = notify_dir.make(settings, notices.append)
        if settings.foreground and settings.log_file is not None:  # else the log is on the terminal
            for notice in notices:
                tell(escape(notice), verdict)
        settings = replace(settings, notices=(*settings.notices, *notices))
        descriptors = {}
        if folder is not None:
            made.callback(folder.discard)
            settings = replace(settings, notify_folder=folder.path)
            descriptors[inherited.NOTIFY] = folder.fd
        if telling is not None:
            fds = [*descriptors.values(), *([pid_file.fd] if pid_file is not None else ())]
            begin(telling, _files_made(settings, bound, fds), notices)
        try:
            _exec(settings, bound, descriptors, pid_file, verdict)
        except OSError as error:
            if error.filename is None or error.errno == errno.EMFILE:
                raise SystemRefused(
                    f"cannot pass descriptors to the resident process: {what_failed(error)}; "
                    "raise its limits (ulimit -n), or free memory"
                ) from error
            if error.filename == os.devnull:
                raise SystemRefused(f"cannot start: {what_failed(error)}") from error
            raise SystemRefused(
                f"cannot execute {error.filename}: {error.strerror}; was it removed meanwhile, "
                "or is a folder on its path closed to --user?"
            ) from error


def _context(
    settings: Settings, pid_file: PidFile | None, kept: list[int], log: int | None
) -> DaemonContext:
    """Return the context that takes the pid file and, without -f, detaches.

    kept: the descriptors that stay open.  log: the target of stdout and stderr, if not None.
    """
    detach = not settings.foreground
    # DaemonContext replaces None with /dev/null, so in the foreground pass the present descriptors.
    # ruff: noqa: SIM115 -- they stay open for the life of the daemon
    standard = [None if detach else open(fd, "r+b", 0, closefd=False) for fd in (0, 1, 2)]
    if log is not None:
        standard[1:] = [open(log, "ab", 0)] * 2
    # Override DaemonContext's defaults, which workers would inherit: umask 0, no core dumps, TSTP
    # ignored, no detaching if stdin is a socket.  Do not pass a uid: DaemonContext drops privileges
    # before it writes the pid file.  It closes all descriptors that are not in files_preserve.
    # Source: python-daemon 3.1, open().
    return DaemonContext(
        pidfile=pid_file,
        detach_process=detach,
        files_preserve=kept,
        working_directory=settings.origin.directory,
        umask=settings.umask,
        prevent_core=False,
        signal_map={},
        stdin=standard[0],
        stdout=standard[1],
        stderr=standard[2],
    )


def _files_made(
    settings: Settings, bound: Mapping[str, Bound], descriptors: Iterable[int]
) -> dict[str, list[int]]:
    """Return the files that this start has made, each with numbers that identify it.

    Nothing is looked up by its path, where another user may have put another file meanwhile.
    descriptors: of the pid file and of the folder of notify sockets.
    """
    made = {}
    for fd in descriptors:
        found = os.fstat(fd)
        path = settings.notify_folder if stat.S_ISDIR(found.st_mode) else settings.pid_file
        made[str(path)] = file_identity(found)
    for each in bound.values():
        if each.settings.inode and not each.inherited:
            path = each.settings.address.removeprefix("unix:")
            identity = socket_identity(each.settings.device, each.settings.inode)
            made[path] = made[socket_file.own_file(path, each.socket)] = identity
    return made


def _exec(
    settings: Settings,
    bound: Mapping[str, Bound],
    more: Mapping[str, int],
    pid_file: PidFile | None,
    verdict: int,
) -> None:
    rights = Rights.of(settings)
    content = inherited.memory_file(inherited.SETTINGS, dump(settings))
    if settings.identity is not None:
        os.fchown(content, rights.settings_owner, -1)  # a resume compares the owner
    descriptors = {inherited.SETTINGS: content, **more}
    descriptors.update((name, each.socket.fileno()) for name, each in bound.items())
    descriptors[inherited.TERMINAL if settings.foreground else inherited.LAUNCHER] = verdict
    if pid_file is not None:
        descriptors[inherited.PID_FILE] = pid_file.fd
    # A standard descriptor that our caller had closed is now /dev/null, with close-on-exec set.
    for fd in (0, 1, 2):
        os.set_inheritable(fd, True)
    # If `-m` found the package in the current folder, the next program needs that folder, too.
    python_options = [] if sys.path[:1] == [os.getcwd()] else ["-P"]
    # `ps` shows these words, so they contain only the command's name, and no secret.
    addresses = (each.address for each in settings.listeners)
    label = (settings.name, *addresses, "--", settings.executed[0])
    command = list(command_of(label, python_options))
    privileges.become_subreaper()  # for system/proc_scan.py; the next program needs no ctypes
    if settings.guarded:
        # The guard holds every descriptor of the protector, so it needs the same limit.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        guard_options = ["--json"] if settings.log_format == "json" else []
        if settings.pid_file is not None:
            guard_options.append(f"{guard.PID_FILE_OPTION}{settings.pid_file}")
        command = [sys.executable, "-I", "-S", guard.__file__, *guard_options, *command]
    rights.become()
    need_descriptors()  # check here, because after the exec the reason would be only in the log
    with (
        privileges.lent() if rights.starts_others else nullcontext(),
        inherited.kept_through_exec(descriptors) as variables,
    ):
        os.execve(command[0], command, {**os.environ, **variables})
