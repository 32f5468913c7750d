"""Resolves the program of a new generation: its command, environment and limits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from socketprotector_client import wire

from .. import __file__ as package
from ..model import listen_fds, release
from ..model.records import GenerationRecord, Program
from ..model.settings import Identity, Settings
from . import env_file, privileges
from .executable import resolve
from .spawn import in_child
from .trusted_path import only_lead

#: Prefixes of the protector's own variables, which must not reach a worker.
_PRIVATE = ("NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "SOCKETPROTECTOR_", "FDSTORE")

#: How the names of files end that a program writes, and does not run.
_WRITTEN = (".log", ".pid")
#: The PATH of workers that do not get the caller's PATH: systemd's (systemd.exec(5)).
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Runs an adapter of this package, from the location of the running code.
_RUN = (
    "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); "
    "from socketprotector.programs.{} import main; main()"
)


def program_of(settings: Settings) -> Program:
    """Resolve the command as it is now; return its program.  Raises OSError or ValueError."""
    environment = inherited_environment(settings)
    own = {**env_file_of(settings), **dict(settings.environment)}
    mode, ready_fd = settings.mode, listen_fds.ready_fd(settings)
    if mode.workers_accept:
        values = listen_fds.fill(tuple(own.values()), settings.listeners, ready_fd)
        environment.update(listen_fds.listener_variables(settings.listeners))
        own = dict(zip(own, values, strict=True))
    environment.update(own)
    if settings.release:
        environment[release.VARIABLE] = settings.release
    directory, path, argv = _places(settings, environment.get("PATH", os.defpath))
    environment["PWD"] = directory
    if mode.workers_accept:
        argv = listen_fds.fill(argv, settings.listeners, ready_fd)
    elif mode.adapter:
        path, argv = sys.executable, _adapted(settings, path, argv)
    resolved = {
        "path": path,
        "argv": argv,
        "directory": directory,
        "environment": tuple(environment.items()),
        "limits": tuple({"nofile": settings.nofile_soft, **dict(settings.limits)}.items()),
        "identity": settings.worker_identity,
        "listeners": wire.pack_listeners(
            [wire.REMOVED_LISTENER if e.removed else e.address for e in settings.listeners]
        ),
        "ready_after_s": listen_fds.ready_after_s(settings),
        "ready_fd": ready_fd,
    }
    # Any other field of a program is the setting of the same name.
    fields = {**vars(settings.policy), **vars(settings), **resolved}
    return Program(**{name: fields[name] for name in Program.__match_args__})


def env_file_of(settings: Settings) -> dict[str, str]:
    """Return the variables in the env file.  Raises OSError, or ValueError with the line."""
    if settings.env_file is None:
        return {}
    contents = partial(env_file.contents, settings.env_file)
    found = _with_rights_of(env_file_reader(settings), contents)
    # Pass on bytes that are not UTF-8 unchanged, as in our own environment.
    return env_file.parse(found.decode("utf-8", "surrogateescape"), settings.env_file)


def env_file_reader(settings: Settings) -> Identity | None:
    """Return the user with whose rights the env file is read; None: with our own.

    A deployer, or the workers' user, may lead the path to any file.  So the workers' user must be
    able to read the file, unless only root and the protector's user can change where it leads.
    """
    protector, worker = settings.identity, settings.worker_identity
    if protector is None or worker is None:
        return protector
    return protector if only_lead(settings.env_file or "", {0, protector.uid}) else worker


def _places(settings: Settings, search: str) -> tuple[str, str, tuple[str, ...]]:
    """Return the real directory and path of the command, and its argv.  Raises OSError.

    A deployer may lead both elsewhere, so only links that the workers' user can read are followed.
    """

    def find() -> bytes:
        directory = os.path.realpath(settings.directory, strict=True)
        path, argv = resolve(settings.executed, directory, search)
        return b"\0".join(map(os.fsencode, (directory, path, argv[0])))

    found = _with_rights_of(settings.worker_identity, find)
    directory, path, name = map(os.fsdecode, found.split(b"\0"))
    return directory, path, (name, *settings.executed[1:])


def _with_rights_of(identity: Identity | None, act: Callable[[], bytes]) -> bytes:
    """Call `act` with a user's rights to files; None: with our own.  Return its result."""
    if identity is None or identity.uid == os.geteuid():
        return act()
    use_files_as = privileges.use_files_as  # a late module: the child cannot load it

    def act_as_user() -> bytes:
        use_files_as(identity)
        return act()

    return in_child(act_as_user)


def change_of(record: GenerationRecord) -> str:
    """Return a warning if a serving generation's file was changed in place; otherwise ""."""
    file = changed_file(record.program, record.opened_at)
    if not file:
        return ""
    if record.program.mode.pooled:
        return f"generation {record.number} runs the same changed file: {file}"
    crash = f"if a worker of generation {record.number} crashes"
    return f"restore {file}: {crash}, its replacement runs the changed file"


def name_of(program: Program) -> str:
    """Return the first word of COMMAND, also if an adapter of this package starts it.

    For a shell's command return "sh": the command may have passwords.
    """
    options, argv = _adapter_and_command(program)
    return "sh" if "--shell" in options else argv[0]


def changed_file(program: Program, since: float) -> str:
    """Return a file of a program, if the file has changed since a time; "": none, or unknown.

    This checks the executable, and the first argument that is a file, such as a script.  It skips
    files that the program writes, by their names.
    since: seconds since the epoch.
    """
    path = program.path
    options, argv = _adapter_and_command(program)
    if options:
        if "--shell" in options:
            argv = ("", *argv[0].split())
        path = options[options.index("--file") + 1] if "--file" in options else argv[0]
    for file in (path, next(filter(os.path.isfile, _paths(program.directory, argv[1:])), "")):
        try:
            if file and os.stat(file).st_ctime > since:
                return file
        except (OSError, ValueError):
            pass  # removed
    return ""


def _adapter_and_command(program: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the adapter's words and options, () without an adapter, and the words of COMMAND."""
    argv = program.argv
    if program.mode.adapter and "--" in argv:  # otherwise an older protector has started it
        at = argv.index("--")
        return argv[:at], argv[at + 1 :]
    return (), argv


def _paths(directory: str, words: Iterable[str]) -> Iterator[str]:
    files = (each for each in words if not each.startswith("-") and not each.endswith(_WRITTEN))
    return (os.path.join(directory, each) for each in files)


def inherited_environment(settings: Settings) -> dict[str, str]:
    """Return the inherited part of the workers' environment, with their user's variables."""
    keep = settings.keep_env
    found = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_PRIVATE) and (keep is None or name in keep)
    }
    if keep is not None:
        found.setdefault("PATH", _PATH)
    who = settings.worker_identity or settings.identity
    if who is not None:
        names = {"HOME": who.home, "SHELL": who.shell, "USER": who.user, "LOGNAME": who.user}
        found.update((name, value) for name, value in names.items() if value)
    return found


def _adapted(settings: Settings, path: str, argv: tuple[str, ...]) -> tuple[str, ...]:
    """Return path and argv of the adapter that starts a command."""
    files = (package, wire.__file__)
    packages = dict.fromkeys(os.path.dirname(os.path.dirname(each)) for each in files)
    run = _RUN.format(settings.mode.adapter)
    adapter: tuple[str, ...] = (sys.executable, "-I", "-S", "-c", run, ":".join(packages))
    if settings.mode.pooled:
        adapter += ("--at-once", str(settings.workers), "--of", str(settings.processes))
        adapter += ("--shell",) if settings.shell else ("--file", path)
    else:
        argv = (path, *argv[1:])
    return (*adapter, "--", *(settings.command if settings.shell else argv))
