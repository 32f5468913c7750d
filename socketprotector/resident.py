"""The resident process: what stays when the command line has been parsed.

It is executed by the launching process with its descriptors at the door (door.py), so
that nothing of the command line's libraries stays in memory.  Heavy imports do not
belong here: tests hold the list, bench/ the megabytes.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable

from . import door
from .effects import Effects
from .errors import Refusal, SystemRefused
from .events import Event, StopRequested
from .fleet import Fleet
from .launcher import Launcher
from .listener import Listener
from .log import Log
from .loop import Loop
from .notify import Systemd
from .output import Output
from .settings import Identity, Settings, load
from .supervisor import Supervisor, terminal_of

#: How soon to try again where systemd's socket was full.
_NOTIFY_AGAIN_S = 0.1


def main() -> None:
    """Run until nothing is left to supervise, and exit with the status of that."""
    sys.exit(run(door.enter()))


def run(descriptors: dict[str, int]) -> int:
    """Supervise with the descriptors from the door, which it owns.  Returns the exit status."""
    os.chdir("/")  # only now: until here modules may have come from the caller's directory
    settings = _settings(descriptors[door.SETTINGS])
    _name_process()
    launcher = Launcher(descriptors.get(door.LAUNCHER), descriptors.get(door.TERMINAL))
    listeners = [
        Listener(descriptors[f"{door.LISTENER}{index}"], index, each)
        for index, each in enumerate(settings.listeners)
    ]
    output = Output(settings.log_file)
    try:
        status = _supervise(settings, launcher, listeners, output)
    except Exception as error:
        # Nothing can go on; but nobody may be left waiting, nor anything be left lying about.
        if not isinstance(error, Refusal):
            sys.excepthook(type(error), error, error.__traceback__)
        launcher.failure = launcher.failure or str(error)
        for listener in listeners:
            listener.close()
        status = SystemRefused.status
    output.finish()
    _remove_pid_file(settings.pid_file, descriptors.get(door.PID_FILE))
    launcher.failed(status)
    return status


def _supervise(
    settings: Settings, launcher: Launcher, listeners: list[Listener], output: Output
) -> int:
    # Only the soft limit, and workers get the caller's back: each draining generation and
    # each worker costs descriptors here.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if settings.identity is not None:
        become(settings.identity, settings.nice)
    for listener in listeners:
        listener.claim()

    loop = Loop()
    relayed = not settings.foreground and settings.log_file is None
    log = Log(settings.log_level, prioritized=relayed)
    if relayed:
        output.start_relay(settings.name, loop, lambda: log.write("error", "relay-ended"))
        log.reopen()
    systemd = Systemd(os.environ, lambda again: loop.call_after("notify", _NOTIFY_AGAIN_S, again))
    log.write(
        "info",
        "start",
        pid=os.getpid(),
        name=settings.name,
        listen=" ".join(each.address for each in settings.listeners),
    )
    for notice in settings.notices:
        log.write("warning", "notice", text=notice)

    def effects(post: Callable[[Event], None]) -> Effects:
        return Effects(
            settings,
            listeners,
            loop=loop,
            log=log,
            output=output,
            systemd=systemd,
            launcher=launcher,
            post=post,
        )

    def reopen_logs() -> None:
        try:
            output.reopen()
        except OSError as error:
            log.write("error", "reopen-failed", file=error.filename, error=error.strerror)
        log.reopen()
        log.write("info", "reopened")

    supervisor = Supervisor(
        Fleet(policy=settings.policy, workers_wanted=settings.workers),
        effects,
        loop=loop,
        log=log,
        reopen_logs=reopen_logs,
        terminal=terminal_of(settings.foreground),
    )
    launcher.watch(loop, lambda: supervisor.post(StopRequested(quick=True)))
    if systemd.watchdog_s:
        _feed(systemd, loop)
    status = supervisor.run()
    log.close()
    return status


def _settings(fd: int) -> Settings:
    size = os.fstat(fd).st_size
    return load(os.pread(fd, size, 0))


def _name_process() -> None:
    """Show as SocketProtector where processes are listed by name (ps, pgrep, pkill)."""
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write("SocketProtector")
    except OSError:
        pass  # no /proc: the name is a courtesy


def become(identity: Identity, nice: int) -> None:
    """Drop to another user for good, supplementary groups too.  Raises OSError.

    nice: what workers are to have; a value below 0 is allowed to that user before.
    """
    try:
        if nice < 0:
            resource.setrlimit(resource.RLIMIT_NICE, (20 - nice, 20 - nice))
    except (OSError, ValueError) as error:
        raise SystemRefused(
            f"cannot allow {identity.user} nice {nice}: {error}; that needs CAP_SYS_RESOURCE"
        ) from error
    try:
        os.setgroups(identity.groups)
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    except OSError as error:
        raise SystemRefused(
            f"cannot become {identity.user}: {error.strerror}; root without CAP_SETUID and "
            "CAP_SETGID cannot"
        ) from error


def _feed(systemd: Systemd, loop: Loop) -> None:
    """Tell systemd's watchdog that the loop turns, and again in half the time it allows."""
    systemd.send(WATCHDOG="1")
    loop.call_after("watchdog", systemd.watchdog_s, lambda: _feed(systemd, loop))


def _remove_pid_file(path: str | None, lock: int | None) -> None:
    """Remove the pid file if it is still the one whose lock we hold."""
    if path is None or lock is None:
        return
    try:
        found, ours = os.lstat(path), os.fstat(lock)
        if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
            os.unlink(path)
    except OSError:
        pass  # removed already, or in a folder that is not this user's: said at start


if __name__ == "__main__":
    main()
