"""Whether what was asked for can be had: looked at before anything is changed.

So that the operator reads one clear line instead of a start that fails half-way.
Everything here raises Refusal, or says a notice.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import importlib.util
import os
import pwd
import re
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from ..model import fd_budget, handoff, known_servers
from ..model.errors import AlreadyRunning, SystemRefused, UsageError
from ..model.settings import Identity, Settings
from ..system import env_file, executable
from ..system.program import inherited_environment
from . import suggestion, user_access
from .listen_spec import Listen
from .pidfile import PidFile

T = TypeVar("T")

#: It has waitid(P_PIDFD); pidfd_open came with 5.3, pidfd_send_signal with 5.1, memfd_create 3.17.
OLDEST_KERNEL = (5, 4)
#: Where syslog(3) writes; a container has none.
_SYSLOG = "/dev/log"
#: Of a file that may use the client library, in bytes: it is imported at the top.
_LOOKED_AT = 1 << 16
_SOMAXCONN = "/proc/sys/net/core/somaxconn"


def kernel() -> None:
    """Refuse a kernel, or a filter of system calls, without what everything here stands on."""
    missing: list[str] = []
    forbidden: list[str] = []
    for call, look in (
        ("memfd_create", _sealed_memory),
        ("posix_spawn", _spawn),
        ("pidfd_open", _pidfd),
        ("pidfd_send_signal", lambda: _with_pidfd(lambda fd: signal.pidfd_send_signal(fd, 0))),
        ("waitid(P_PIDFD)", lambda: _with_pidfd(_wait)),
    ):
        try:
            look()
        except AttributeError:  # this Python was built for an older system
            missing.append(call)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EINVAL):
                missing.append(call)
            elif error.errno in (errno.EPERM, errno.EACCES):
                forbidden.append(call)
            # Else it is there, and short of something: whoever needs it will say so.
    release = os.uname().release
    said = []
    if missing:
        oldest = ".".join(map(str, OLDEST_KERNEL))
        said.append(
            f"{', '.join(missing)}: not there; Linux {oldest} or later is needed, this is {release}"
            f"{' with a filter of system calls' if _is_new(release) else ''}"
        )
    if forbidden:
        said.append(
            f"{', '.join(forbidden)}: forbidden by a filter of system calls; allow it (a "
            "container's seccomp profile, SystemCallFilter= of a unit)"
        )
    if said:
        raise SystemRefused("; ".join(said))


def _is_new(release: str) -> bool:
    numbers = [int(each) for each in re.findall(r"\d+", release)[:2]]
    return numbers >= list(OLDEST_KERNEL)


def _sealed_memory() -> None:
    fd = os.memfd_create("sp.check", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    finally:
        os.close(fd)


def _spawn() -> None:
    """glibc starts programs by clone3, and by clone where that is unknown, not where forbidden."""
    try:
        os.posix_spawn("", ("none",), {})
    except FileNotFoundError:
        pass  # the process was there, and found no program


def _pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _with_pidfd(use: Callable[[int], object]) -> None:
    """Use one of this process; where there is none to be had, that alone is to be said."""
    try:
        fd = os.pidfd_open(os.getpid())
    except (OSError, AttributeError):
        return
    try:
        use(fd)
    finally:
        os.close(fd)


def _wait(fd: int) -> None:
    try:
        os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        pass  # nobody is a child of its own: understood


def here() -> str:
    """The caller's directory, by the name it has for him: a symlink in it is meant."""
    logical = os.environ.get("PWD", "")
    try:
        if os.path.isabs(logical) and os.path.samefile(logical, "."):
            return logical
        return os.getcwd()
    except OSError as error:
        raise SystemRefused(
            f"the current directory is gone ({error.strerror}); cd to one that exists"
        ) from error


def identity(user: str | None, group: str | None, *, again: bool = False) -> Identity | None:
    """Look up --user and --group; None when neither is given.

    again: for a protector that runs, maybe as that user already.
    """
    if user is None and group is None:
        return None
    try:
        entry = _find(str(os.getuid()) if user is None else user, pwd.getpwuid, pwd.getpwnam)
    except KeyError:
        raise UsageError(f"--user {user}: unknown user; see getent passwd") from None
    gid = entry.pw_gid
    if group is not None:
        try:
            gid = _find(group, grp.getgrgid, grp.getgrnam).gr_gid
        except KeyError:
            raise UsageError(f"--group {group}: unknown group; see getent group") from None
    if os.geteuid() != 0 and not again:
        raise UsageError("--user and --group need root; leave them out or start as root")
    return _identity(entry, gid)


def says_who(user: str | None, file: str | None) -> None:
    """Refuse to be root where nobody has said so; file: where it could be said."""
    if user is None and os.geteuid() == 0:
        wanted = f'write user = "NAME" in {file}, or' if file else "give --user NAME, or --user"
        root = 'user = "root"' if file else "root"
        raise UsageError(f"no user, so all would run as root: {wanted} {root} if that is meant")


def group(name: str | None) -> int | None:
    """Look up --control-group; None when it is not given."""
    if name is None:
        return None
    try:
        return _find(name, grp.getgrgid, grp.getgrnam).gr_gid
    except KeyError:
        raise UsageError(f"--control-group {name}: unknown group; see getent group") from None


def worker_identity(worker_user: str | None, user: str | None) -> Identity | None:
    """Look up --worker-user; None when it is not given."""
    if worker_user is None:
        return None
    if user is None:
        raise UsageError("--worker-user needs --user: who the protector itself is to be")
    try:
        entry = _find(worker_user, pwd.getpwuid, pwd.getpwnam)
    except KeyError:
        raise UsageError(f"--worker-user {worker_user}: unknown user; see getent passwd") from None
    return _identity(entry, entry.pw_gid)


def _identity(entry: pwd.struct_passwd, gid: int) -> Identity:
    name = entry.pw_name
    groups = tuple(os.getgrouplist(name, gid))
    return Identity(name, entry.pw_uid, gid, groups, entry.pw_dir, entry.pw_shell)


def _find(name: str, by_number: Callable[[int], T], by_name: Callable[[str], T]) -> T:
    return by_number(int(name)) if name.isdecimal() else by_name(name)


def workers(settings: Settings) -> None:
    """Refuse more than the protector's descriptors can be of."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    refused = fd_budget.refused(settings, settings.processes, hard)
    if refused is not None:
        raise UsageError(f"--workers: {refused}")


def env_file_readable(path: str | None) -> None:
    """Refuse a file of variables that could not be read now."""
    if path is None:
        return
    try:
        env_file.read(path)
    except OSError as error:
        raise UsageError(f"--env-file {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--env-file: {error}") from error


def _environment(settings: Settings) -> dict[str, str]:
    """What the command will find there, names of descriptors as they are written."""
    environment = inherited_environment(settings)
    if settings.env_file is not None:
        environment.update(env_file.read(settings.env_file))
    environment.update(settings.environment)
    return environment


def command(settings: Settings) -> None:
    """Refuse a command that could not be started now."""
    try:
        environment = _environment(settings)
    except (OSError, ValueError):
        return  # env_file() refuses that, and PATH may be in there
    try:
        search = environment.get("PATH", os.defpath)
        path, _ = executable.resolve(settings.executed, settings.directory, search)
    except PermissionError as error:
        raise UsageError(
            f"cannot run {error.filename}: {error.strerror}; chmod +x it, or name its interpreter"
        ) from error
    except OSError as error:
        raise UsageError(
            f"cannot run {error.filename}: {error.strerror}; check the path"
        ) from error
    _reachable(settings, path)
    if settings.ready_check and not os.access("/bin/sh", os.X_OK):
        raise UsageError(f"--ready check:{settings.ready_check}: there is no /bin/sh to run it")


def _reachable(settings: Settings, path: str) -> None:
    """Refuse a command that root could start, and the user that starts it or is it cannot."""
    if settings.identity is None:
        return
    name = settings.executed[0]
    typed = {os.path.join(settings.directory, name): os.X_OK} if "/" in name else {}
    folder = {os.path.join(settings.directory, ""): os.X_OK}
    python = {sys.executable: os.X_OK}
    adapted = settings.handoff in (handoff.STDIO, handoff.LEGACY)
    protector = {**folder, **typed, path: os.X_OK, **(python if settings.guarded else {})}
    worker = {**folder, **user_access.executed(path), **(python if adapted else {})}
    if settings.worker_identity is None:
        asked = [("--user", settings.identity, {**protector, **worker})]
    else:
        asked = [
            ("--user", settings.identity, protector),
            ("--worker-user", settings.worker_identity, worker),
        ]
    for option, identity, needed in asked:
        closed = user_access.as_user(identity, partial(user_access.closed, needed))
        if closed:
            raise SystemRefused(
                f"{option} {identity.user} {closed}; let that user through (chmod, chown), "
                "or install it elsewhere"
            )


def mode(settings: Settings, given: Collection[str], listens: Sequence[Listen]) -> None:
    """Refuse what the handoff mode cannot do, and names in the command that nothing has.

    given: the options that were given, without their dashes.
    """
    refused = handoff.refused(settings, given)
    if refused is not None:
        raise UsageError(refused)
    if settings.handoff == handoff.LEGACY:
        without = next((each.text for each in listens if each.path is not None), None)
        if without is not None:
            raise UsageError(f"{without}: --handoff legacy knows workers by their port; give one")
    if settings.log_prefix and not settings.log_relay:
        raise UsageError("--log-prefix: it is the relay that writes it; leave out --no-log-relay")
    if settings.shell and len(settings.command) > 1:
        raise UsageError("--shell takes COMMAND as one word, in quotes: -- 'cat | tr a b'")


def names(settings: Settings) -> None:
    """Refuse names for descriptors that stand for nothing, and a number that is taken."""
    if settings.handoff != handoff.LISTENER:
        return
    values = [value for _, value in settings.environment]
    try:
        ready = handoff.ready_fd(settings)
        handoff.filled((*settings.command, *values), settings.listeners, ready)
    except handoff.HandoffError as error:
        raise UsageError(str(error)) from error
    taken = handoff.descriptors(settings.listeners).values()
    if settings.ready_fd in taken:
        raise UsageError(
            f"--ready fd:{settings.ready_fd}: a listener has this number in the worker; "
            f"choose {max(taken) + 1} or above"
        )


def pid_file(path: str | None, *, check: bool = False) -> None:
    """Refuse early what would otherwise show as `port in use`; check: nothing is to be started."""
    if path is None:
        return
    folder = os.path.dirname(path)
    try:
        holder = PidFile(path).holder()
    except OSError as error:
        raise SystemRefused(
            f"cannot use the pid file {path}: {error.strerror}; check {folder} and its rights"
        ) from error
    if holder is not None:
        do = "stop or reload that one"
        if check:
            do = "socketprotectorctl diff says what a reload of that one would do"
        raise AlreadyRunning(f"the pid file {path} is held by process {holder}; {do}")
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise SystemRefused(
            f"cannot write the pid file {path}: {_why_not(folder)}; check {folder} and its rights"
        )


def log_file(path: str | None) -> None:
    """Refuse a log file that could not be written; for --check, which must not make it."""
    if path is None:
        return
    there = path if os.path.lexists(path) else os.path.dirname(path)
    if os.path.isdir(path) or not os.access(there, os.W_OK):
        raise SystemRefused(
            f"cannot write the log file {path}: {_why_not(there)}; check {there} and its rights"
        )


def _why_not(there: str) -> str:
    """Say why it cannot be written: os.access() keeps the reason for itself."""
    try:
        protected = os.statvfs(there).f_flag & os.ST_RDONLY
    except OSError as error:
        return os.strerror(error.errno or errno.EACCES)
    return os.strerror(errno.EROFS if protected else errno.EACCES)


def watch(paths: Sequence[str], directory: str) -> tuple[str, ...]:
    """Return --watch's paths, whole; refuse what cannot be watched."""
    if paths and importlib.util.find_spec("watchfiles") is None:
        raise UsageError(
            f"--watch {paths[0]}: watchfiles is not installed; pip install 'socketprotector[watch]'"
        )
    found = tuple(os.path.normpath(os.path.join(directory, path)) for path in paths)
    for path, there in zip(paths, found, strict=True):
        if not os.path.lexists(there):
            raise UsageError(f"--watch {path}: No such file or directory")
    return tuple(dict.fromkeys(found))


def server(settings: Settings, listens: Sequence[Listen], *, typed: bool) -> Iterator[str]:
    """Say what a well-known server lacks as it is started, and how to start it.

    typed: for the terminal, in the operator's own words; else none of its arguments is told.
    """
    name = known_servers.known(settings.command)
    if name is None:
        return
    try:
        environment = _environment(settings)
    except (OSError, ValueError):
        return
    found = known_servers.lacks(
        settings.command,
        (f"{variable}={value}" for variable, value in environment.items()),
        mode=settings.handoff,
        settles=settings.policy.settle_s > 0,
        after_s=handoff.ready_after_s(settings),
    )
    if found is None or (settings.handoff == handoff.CONNECTION and _speaks(settings, environment)):
        return
    how = known_servers.as_in(name)
    if typed:
        own = suggestion.line(settings.origin.words, listens, settings.handoff)
        how = f"start it as: {own}" if own else known_servers.to_add(name)
    yield f"{found}; {how}"


def _speaks(settings: Settings, environment: Mapping[str, str]) -> bool:
    """Whether a file that the command names, or that gunicorn reads, uses the client library."""
    words = [*settings.command[1:], *environment.get("GUNICORN_CMD_ARGS", "").split()]
    named = [word.rpartition("=")[2].removeprefix("-c").removeprefix("file:") for word in words]
    for path in (*named, "gunicorn.conf.py"):
        try:
            fd = os.open(os.path.join(settings.directory, path), os.O_RDONLY | os.O_NONBLOCK)
        except (OSError, ValueError):
            continue
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode) and known_servers.OURS in str(
                os.read(fd, _LOOKED_AT)
            ):
                return True
        finally:
            os.close(fd)
    return any(known_servers.OURS in word for word in words)


def syslog(settings: Settings) -> Iterator[str]:
    """Say that every line would be lost.  At boot syslog may come later: so no refusal."""
    if settings.to_syslog and not _syslog_listens():
        yield (
            f"nobody listens at {_SYSLOG}: until somebody does, every line of the log and of the "
            "workers is lost; use --log-file FILE, or -f to write to this terminal"
        )


def _syslog_listens() -> bool:
    """Connect as syslog(3) does, which is what the relay writes with."""
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.connect(_SYSLOG)
            except BlockingIOError:  # its backlog is full
                return True
            except OSError as error:
                if error.errno != errno.EPROTOTYPE:
                    return False
            else:
                return True
    return False


def notices(settings: Settings, listens: Sequence[Listen], backlog: int) -> Iterator[str]:
    """Say what will work less well than the operator may think."""
    asked = max(listen.backlog(backlog) for listen in listens)
    try:
        with open(_SOMAXCONN, encoding="ascii") as file:
            most = int(file.read())
    except (OSError, ValueError):
        most = asked
    if asked > most:
        yield f"backlog {asked} is cut to {most}: raise the sysctl net.core.somaxconn"
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    doubtful = fd_budget.doubtful(settings, settings.processes, hard)
    if doubtful is not None:
        yield doubtful
    if settings.identity is None:
        return
    files = [settings.pid_file, settings.log_file]
    # What systemd has made it removes, with the pid file in it, which is written into and no more.
    if os.path.dirname(settings.pid_file or "") in os.environ.get("RUNTIME_DIRECTORY", "").split(
        ":"
    ):
        del files[0]
    files += [each.address.removeprefix("unix:") for each in settings.listeners if each.inode]
    folders = dict.fromkeys(os.path.dirname(file) for file in files if file)
    others = [folder for folder in folders if os.stat(folder).st_uid != settings.identity.uid]
    if others:
        yield (
            f"{' and '.join(others)} should be {settings.identity.user}'s: files there cannot be "
            "removed at the end or opened anew"
        )
