"""Checks that a start can succeed, before anything is changed.

So the operator reads one clear line, and no start fails half-way.
Each check raises a Refusal, or yields notices.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import resource
import socket
import stat
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

from ..model import fd_budget, handoff_modes, listen_fds, probe_spec
from ..model.errors import AlreadyRunning, SystemRefused, UsageError
from ..model.settings import Settings
from ..system import executable, state_file
from ..system.program_spec import env_file_of, env_file_reader, inherited_environment
from . import unix_access, user_access
from .listen_spec import Listen
from .pid_file import PidFile, hint

#: Where syslog(3) writes.  A container usually has no such socket.
_SYSLOG = "/dev/log"
_HOW = {
    errno.EACCES: "chmod +x it, or name its interpreter",
    errno.ENOEXEC: "give it a first line such as #!/bin/sh, or check what was installed there",
}
_SOMAXCONN = "/proc/sys/net/core/somaxconn"
#: A start writes less than this into a memfd (system/late_modules.py).
_KEPT_BYTES = 1024 * 1024
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
#: What a user needs to execute a further process of ours: this Python and our package's folder.
_OURSELVES = {sys.executable: os.X_OK, os.path.join(_PACKAGE, ""): os.X_OK}


def working_directory() -> str:
    """Return the current directory as the shell names it, with symbolic links."""
    logical = os.environ.get("PWD", "")
    try:
        here = os.stat(".")
        with suppress(OSError):  # a manager may pass on its own PWD, which may be gone
            if os.path.isabs(logical) and os.path.samestat(os.stat(logical), here):
                return logical
        return os.getcwd()
    except OSError as error:
        how = "cannot be entered" if isinstance(error, PermissionError) else "is gone"
        raise SystemRefused(
            f"the current directory {how} ({error.strerror}); cd to another directory"
        ) from error


def check_workers(settings: Settings) -> None:
    """Refuse a number of workers that needs more descriptors than the limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if refused := fd_budget.refused(settings, settings.processes, hard):
        raise UsageError(f"--workers: {refused}")


def check_env_file(settings: Settings) -> None:
    """Refuse a file of variables that could not be read now."""
    try:
        _env_file(settings)
    except OSError as error:
        reader, why = env_file_reader(settings), error.strerror
        if isinstance(error, PermissionError) and reader is not None:
            why = f"user {reader.user} cannot read it (chown, chmod)"
        raise UsageError(f"--env-file {settings.env_file}: {why}") from error
    except ValueError as error:
        raise UsageError(f"--env-file: {error}") from error


def _env_file(settings: Settings) -> dict[str, str]:
    """Return the variables in the env file; none if only the protector may read it for workers."""
    reader = env_file_reader(settings)
    if reader is not None and os.geteuid() not in (0, reader.uid):
        return {}  # at a reload this process lacks the protector's capabilities
    return env_file_of(settings)


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the workers' environment; placeholders of descriptors are not filled in."""
    environment = inherited_environment(settings)
    environment.update(_env_file(settings))
    environment.update(settings.environment)
    return environment


def check_command(settings: Settings) -> None:
    """Refuse a command that could not be started now."""
    try:
        environment = environment_of(settings)
    except (OSError, ValueError):
        return  # check_env_file() reports this; the file might set PATH, so do not search now
    try:
        search = environment.get("PATH", os.defpath)
        path, _ = executable.resolve(settings.executed, settings.directory, search)
    except OSError as error:
        raise UsageError(_cannot_run(error)) from error
    if refused := user_access.as_worker(settings, partial(_format_refusal, path, settings)):
        raise UsageError(refused)
    _refuse_unreachable(settings, path)
    if settings.ready_check:
        _need_shell(f"--ready check:{settings.ready_check}")


def _cannot_run(error: OSError) -> str:
    how = _HOW.get(error.errno or 0, "check the path")
    return f"cannot run {error.filename}: {error.strerror}; {how}"


def _format_refusal(path: str, settings: Settings) -> str:
    """Return why the kernel cannot execute a file, "" if it can."""
    try:
        executable.refuse_format(path, settings.directory)
    except OSError as error:
        return _cannot_run(error)
    return ""


def _need_shell(probe: str) -> None:
    """Refuse a command that needs a shell if there is no shell."""
    if not os.access("/bin/sh", os.X_OK):
        raise UsageError(f"{probe}: there is no /bin/sh to run it")


def _refuse_unreachable(settings: Settings, path: str) -> None:
    """Refuse a command that root could use, but the configured user cannot."""
    if settings.identity is None:
        return
    name = settings.executed[0]
    typed = {os.path.join(settings.directory, name): os.X_OK} if "/" in name else {}
    folder = {os.path.join(settings.directory, ""): os.X_OK}
    adapted = bool(settings.mode.adapter)
    protector = {**folder, **typed, path: os.X_OK, **_OURSELVES}
    worker = {**folder, **(_OURSELVES if adapted else {})}
    other = settings.worker_identity

    def closed_to_worker() -> str:
        return user_access.closed({**worker, **user_access.executed(path)})

    def closed_to_protector() -> str:
        return user_access.closed(protector) or ("" if other else closed_to_worker())

    checks = [("--user", settings.identity, closed_to_protector)]
    checks += [("--worker-user", other, closed_to_worker)] if other else []
    for option, identity, closed_to in checks:
        closed = user_access.as_user(identity, closed_to)
        if closed:
            start = f"cannot enter {settings.directory.rstrip('/')}/"
            is_start = closed.startswith((f"{start}:", f"{start}, a link "))
            raise SystemRefused(
                f"{option} {identity.user} {closed}; let that user through (chmod, chown), or "
                + ("start workers elsewhere (--chdir)" if is_start else "install it elsewhere")
            )


def check_mode(settings: Settings, given: Collection[str], listens: Sequence[Listen]) -> None:
    """Refuse options that do not fit the handoff mode, and unknown names in the command.

    given: the options that were given, without their dashes.
    """
    if refused := settings.mode.refused(given):
        raise UsageError(refused)
    placeholders = listen_fds.placeholders(settings.command)
    if placeholders and not settings.mode.workers_accept:
        raise UsageError(f"{placeholders[0]} in the command: {handoff_modes.NEEDS_LISTENER}")
    _check_ready_and_health(settings, listens)
    for each in listens if settings.mode.knows_ports_alone else ():
        if each.path is not None:
            raise UsageError(
                f"{each.text}: --handoff legacy works with a port alone; give PORT or HOST:PORT"
            )
    if settings.log_prefix and not settings.log_relay:
        raise UsageError("--log-prefix needs the log relay; leave out --no-log-relay")
    if settings.shell and (len(settings.command) > 1 or not settings.command[0].strip()):
        raise UsageError("--shell takes COMMAND as one word, in quotes: -- 'cat | tr a b'")


def _check_ready_and_health(settings: Settings, listens: Sequence[Listen]) -> None:
    """Refuse a probe of --ready or --health that no listener supports."""
    if settings.health:
        probe = probe_spec.read_health(settings.health)
        _probed_by(f"--health {settings.health}", probe.listener, listens)
        if probe.kind == probe_spec.CHECK:
            _need_shell(f"--health {settings.health}")
    if settings.policy.answer_decides:
        _need_own_socket(settings, *_ready_probe(settings), listens)


def _ready_probe(settings: Settings) -> tuple[str, str]:
    """Return the probe of --ready as it was written, and the name of its listener."""
    probe = settings.ready_question
    return f"--ready {probe}", probe_spec.read(probe).listener


def _settle_check(settings: Settings) -> tuple[str, str] | None:
    """Return the same for --settle-check; None if it is a command or is not given."""
    text = settings.policy.settle_check
    probe = probe_spec.read_settle_check(text) if text else None
    return (f"--settle-check {text}", probe.listener) if probe and probe.by_http else None


def _need_own_socket(settings: Settings, probe: str, name: str, listens: Sequence[Listen]) -> None:
    """Refuse a probe if two generations would share one socket at each of the probe's listeners."""
    probed = _probed_by(probe, name, listens)
    if probed and settings.mode.workers_accept and not any(map(_can_have_two_sockets, probed)):
        raise UsageError(probe_spec.refusal(probe, " ".join(each.text for each in probed)))


def _probed_by(probe: str, name: str, listens: Sequence[Listen]) -> list[Listen]:
    """Return the listeners with this name, or all for "".  Raises UsageError if there is none.

    If `listens` is empty, do not refuse the probe: LISTEN is missing or mistaken.
    """
    probed = [each for each in listens if name in ("", each.name)]
    if listens and not probed:
        names = ", ".join(each.name for each in listens)
        raise UsageError(f"{probe}: no listener is called {name}; there is: {names}")
    return probed


def check_settle_check(settings: Settings, listens: Sequence[Listen]) -> None:
    """Refuse a --settle-check that would never run, or that no listener supports."""
    policy = settings.policy
    if not policy.settle_check:
        return
    if not (policy.settle_s or policy.canary):
        raise UsageError("--settle-check needs --settle TIME, or --canary SHARE")
    if probe := _settle_check(settings):
        _need_own_socket(settings, *probe, listens)
    else:
        _need_shell("--settle-check check")


def check_siblings(settings: Settings, siblings: Collection[int]) -> None:
    """Refuse a probe if none of its listeners has a second socket.

    siblings: the indexes of the listeners with a second socket.
    """
    if not settings.mode.workers_accept:
        return
    ready = _ready_probe(settings) if settings.policy.answer_decides else None
    for probe, name in filter(None, (ready, _settle_check(settings))):
        probed = {n: e for n, e in enumerate(settings.listeners) if name in ("", e.name)}
        if not probed.keys() & siblings:
            where = " ".join(each.text for each in probed.values())
            raise UsageError(probe_spec.refusal(probe, where))


def _can_have_two_sockets(listen: Listen) -> bool:
    if listen.path is not None:
        return not listen.path.startswith("@")
    return "defer_accept" not in listen.options


def check_descriptor_names(settings: Settings) -> None:
    """Refuse unknown names in {fd:NAME}, and --ready fd:N if a listener has the number N."""
    if not settings.mode.workers_accept:
        return
    values = [value for _, value in settings.environment]
    try:
        ready = listen_fds.ready_fd(settings)
        listen_fds.fill((*settings.command, *values), settings.listeners, ready)
    except listen_fds.PlaceholderError as error:
        raise UsageError(str(error)) from error
    taken = listen_fds.descriptors(settings.listeners).values()
    if settings.ready_fd in taken:
        raise UsageError(
            f"--ready fd:{settings.ready_fd}: a listener has this number in the worker; "
            f"choose {max(taken) + 1} or above"
        )


def check_pid_file(
    path: str | None, others: Mapping[str, str | None], *, check: bool = False
) -> int:
    """Refuse a pid file that cannot be used.

    This comes before the bind, which would only report `port in use`.

    others: the files that other options name, by option.
    check: with --check nothing starts, so a living protector may hold the file.
    Returns the pid of that protector, or 0.
    """
    holder = 0
    if path is None:
        return holder
    if option := _sharer(path, others):
        raise UsageError(
            f"the pid file {path} is also the file of {option}, and would be replaced; "
            "give each its own path"
        )
    folder = os.path.dirname(path)
    try:
        PidFile(path).refuse_if_held("stop or reload that one")
    except AlreadyRunning as error:
        if not check:
            raise
        holder = error.holder
    except OSError as error:
        raise SystemRefused(
            f"cannot use the pid file {path}: {error.strerror}; {hint(error, folder)}"
        ) from error
    _refuse_unwritable("pid file", path, folder)
    return holder


def check_control(path: str, others: Mapping[str, str | None]) -> None:
    """Refuse a --control that names another option's file, or a file that is no socket.

    others: the files that other options name, by option.
    """
    if option := _sharer(path, others):
        raise UsageError(f"--control {path} is also the file of {option}; give each its own path")
    with suppress(OSError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(
                f"--control {path}: a file that is no socket is there; remove it, or choose "
                "another path"
            )


def control_notices(path: str) -> Iterator[str]:
    """Yield why a start would have no control socket at this path.  The daemon starts without."""
    try:
        _refuse_unwritable("control socket", path, os.path.dirname(path))
    except SystemRefused as error:
        yield str(error)


def _sharer(path: str, others: Mapping[str, str | None]) -> str:
    """Return the first option that names the same file; "": none does."""
    named = ((option, other) for option, other in others.items() if other is not None)
    return next((option for option, other in named if _is_same_file(path, other)), "")


def _is_same_file(path: str, other: str) -> bool:
    """Return True if two paths name the same file, or will do so once the file is made."""
    real = os.path.realpath(other)
    with suppress(OSError):
        if os.path.lexists(path):
            return os.path.samestat(os.lstat(path), os.stat(real))
        same_name = os.path.basename(path) == os.path.basename(real)
        return same_name and os.path.samefile(os.path.dirname(path), os.path.dirname(real))
    return False


def check_log_file(path: str | None, others: Mapping[str, str | None]) -> None:
    """Refuse a log file that cannot be used.  This makes no file, as --check requires.

    others: the files that other options name, by option; the log file itself is left out.
    """
    if path is not None:
        if option := _sharer(path, {**others, "--log-file": None}):
            raise UsageError(
                f"the log file {path} is also the file of {option}, which log lines would "
                "damage; give each its own path"
            )
        there = path
        try:
            os.lstat(path)
        except FileNotFoundError:  # the file will be made
            there = os.path.dirname(path)
        except OSError:
            pass  # _refuse_unwritable() reports it
        _refuse_unwritable("log file", path, there)


def _refuse_unwritable(what: str, path: str, there: str) -> None:
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        user_access.refuse_unwritable(there)
    except OSError as error:
        raise SystemRefused(
            f"cannot write the {what} {path}: {error.strerror}; {hint(error, there)}"
        ) from error


def resolve_watched(paths: Sequence[str], directory: str) -> tuple[str, ...]:
    """Return the absolute paths of --watch; refuse a path that cannot be watched."""
    if paths and importlib.util.find_spec("watchfiles") is None:
        raise UsageError(
            f"--watch {paths[0]}: watchfiles is not installed; pip install 'socketprotector[watch]'"
        )
    found = tuple(os.path.normpath(os.path.join(directory, path)) for path in paths)
    for path, there in zip(paths, found, strict=True):
        if not os.path.lexists(there):
            raise UsageError(f"--watch {path}: No such file or directory")
    return tuple(dict.fromkeys(found))


def syslog_notices(settings: Settings) -> Iterator[str]:
    """Warn if no syslog daemon listens.  This is no refusal: at boot, syslog may start later."""
    if settings.to_syslog and not _syslog_listens():
        yield (
            f"no syslog daemon listens at {_SYSLOG}: until one does, every line of the log and of "
            "the workers is lost; use --log-file FILE, or -f to write to this terminal"
        )


def _syslog_listens() -> bool:
    """Return True if syslog(3) can connect; the log relay writes through it."""
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as sock:
            error = sock.connect_ex(_SYSLOG)
            if error != errno.EPROTOTYPE:
                return error in (0, errno.EAGAIN)  # EAGAIN: the daemon's backlog is full
    return False


def notices(settings: Settings, listens: Sequence[Listen], backlog: int) -> Iterator[str]:
    """Yield a warning for each setting that will work less well than the operator may expect.

    Raises SystemRefused if the limit of file sizes is too low for a start.
    """
    wanted = max(listen.backlog(backlog) for listen in listens)
    try:
        with open(_SOMAXCONN, encoding="ascii") as file:
            most = int(file.read())
    except (OSError, ValueError):
        most = wanted
    if wanted > most:
        yield f"backlog {wanted} is cut to {most}: raise the sysctl net.core.somaxconn"
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if doubtful := fd_budget.doubtful(settings, settings.processes, hard):
        yield doubtful
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most != resource.RLIM_INFINITY and most < state_file.MOST_BYTES:
        limit = f"the limit of {most} bytes for files (ulimit -f, LimitFSIZE= of a unit) is too low"
        advice = f"allow {state_file.MOST_BYTES} or more"
        if most < _KEPT_BYTES:
            raise SystemRefused(f"{limit} for a start; {advice}")
        yield (
            f"{limit} for the state, so upgrades fail, and a restart finds an old state; {advice}"
        )
    yield from unix_access.notices(listens, settings.listeners)
    if settings.identity is None:
        return
    # Only files that are removed at the end count.  The log file stays.
    files = [settings.pid_file]
    # systemd removes a RuntimeDirectory= with the pid file in it.
    if os.path.dirname(settings.pid_file or "") in os.environ.get("RUNTIME_DIRECTORY", "").split(
        ":"
    ):
        del files[0]
    files += [each.address.removeprefix("unix:") for each in settings.listeners if each.inode]
    folders = dict.fromkeys(os.path.dirname(file) for file in files if file)
    others = [folder for folder in folders if os.stat(folder).st_uid != settings.identity.uid]
    if others:
        yield (
            f"{' and '.join(others)} should belong to user {settings.identity.user}: files there "
            "cannot be removed at the end"
        )
