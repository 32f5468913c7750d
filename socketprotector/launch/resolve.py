"""Turns the options of the command line and the file into checked settings with resolved paths.

Options with a `field` in options.py are copied to the settings; this module converts the others.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..model import probe_spec, release
from ..model.errors import UsageError
from ..model.handoff_modes import MODES, HandoffMode
from ..model.lazy_dataclass import frozen
from ..model.policy import Policy
from ..model.probe_spec import ProbeSpec
from ..model.reload_orders import ROLLING, STOP_FIRST
from ..model.settings import Identity, Limits, Origin, Settings
from ..model.share import Canary
from ..system.cpu_quota import scheduler
from . import (
    option_values,
    preflight,
    release_choice,
    rollout_checks,
    spread_checks,
    users,
)
from .listen_spec import Listen, parse
from .option_values import Ready
from .options import OPTIONS
from .release_choice import Chosen
from .rights import Rights

if TYPE_CHECKING:
    from .config_file import ConfigFile

#: Without --name, the instance's name is this many characters of the program's name, or fewer: the
#: limit of syslog (RFC 5424).
_NAME_CHARS = 48
#: Keys of the file that concern the rights of the resident process.
_OF_RIGHTS = ("user", "group", "worker-user", "no-new-privs", "limit", "limit.nice")
#: No instance can have these names: the control socket would be in another folder.
_NO_NAMES = (".", "..")


@frozen
class ParsedOptions:
    """The checked options of the command line and the file; nothing is bound yet."""

    settings: Settings
    listens: list[Listen]
    backlog: int
    check: bool
    config: str | None
    control: str | None  # the path of the control socket; None: the default; "": no socket


class OptionResolver:
    """Resolves the options of one start or reload; reports the file's mistakes with their lines."""

    def __init__(self, words: Sequence[str], command: list[str], running: Settings | None) -> None:
        """words: the whole command line; command: the words after `--`.

        running: at a reload, the settings of the running protector.
        """
        self._release = Chosen()
        self._words = tuple(words)
        self._typed_command = command
        self._running = running
        self.file: ConfigFile | None = None

    @property
    def directory(self) -> str:
        """The directory from which relative paths on the command line are resolved."""
        return self._running.origin.directory if self._running else preflight.working_directory()

    def resolve(self, ctx: click.Context, given: dict[str, Any]) -> ParsedOptions:
        """Return the checked options, with absolute paths.  Raises Refusal.

        given: the options' values, by the names of their parameters.
        """
        self._ctx, self._given, file = ctx, given, self.file
        if file is None:
            self._refuse_what_is_missing()
        else:
            names = self._given_options()
            file.overridden = {n for n in names if not self._from_file(n.replace("-", "_"))}
        listens = self._listens()
        settings = self._settings(self._command())
        with self._about("env_file"):
            preflight.check_env_file(settings)
        if settings.command:
            with self._about_file(not self._typed_command, "command"):
                preflight.check_command(settings)
        with self._about("handoff"):
            preflight.check_mode(settings, self._given_options(), listens)
        with self._about("workers"):
            preflight.check_workers(settings)
        with self._about("settle_check"):
            preflight.check_settle_check(settings, listens)
        for name, refused in rollout_checks.refusals(settings, self._given_options(), listens):
            with self._about(name):
                raise UsageError(refused)
        if settings.policy.spreads:
            for name, refused in spread_checks.refusals(settings):
                with self._about(name):
                    raise UsageError(refused)
        with self._about("lame_duck_idle"):
            if given["lame_duck_idle"] and not given["lame_duck"]:
                raise UsageError("--lame-duck-idle needs --lame-duck TIME")
        if file is not None:
            file.refuse_if_mistaken()
            self._refuse_what_is_missing()
        config = file.path if file else None
        control = "" if given["no_control"] else self._path("control")
        return ParsedOptions(settings, listens, given["backlog"], given["check"], config, control)

    def rights(self, ctx: click.Context) -> Rights:
        """Return the rights of the resident process; nothing else is checked.  Raises Refusal."""
        self._ctx, self._given, file = ctx, ctx.params, self.file
        nice = self._limits().get("nice", 0)
        identity, worker_identity = self._users()
        if file is not None:
            file.refuse_if_mistaken(_OF_RIGHTS)
        self._refuse_root_unless_named()
        no_new_privileges = self._given["no_new_privs"]
        return Rights(identity, nice, worker_identity is not None, no_new_privileges)

    def _users(self) -> tuple[Identity | None, Identity | None]:
        """Return the users of --user (with --group) and --worker-user."""
        given, identity, worker_identity = self._given, None, None
        with self._about("user" if self._from_file("user") else "group"):
            again = self._running is not None
            identity = users.identity(given["user"], given["group"], again=again)
        with self._about("worker_user"):
            worker_identity = users.worker_identity(given["worker_user"], given["user"])
        return identity, worker_identity

    def _refuse_root_unless_named(self) -> None:
        if self._given["require_user"]:
            file = self.file
            users.refuse_root_unless_named(self._given["user"], file.path if file else None)

    def _refuse_what_is_missing(self) -> None:
        file = self.file
        if not (self._given["listen"] or (file and file.listens)):
            hint = f", or listen in {file.path}" if file else ""
            raise UsageError(f"no LISTEN; write e.g. SocketProtector 4321 -- ./daemon 4321{hint}")
        if not (self._typed_command or (file and file.command)):
            hint = f", or command in {file.path}" if file else ""
            raise UsageError(
                f"no command; put it behind --, e.g. SocketProtector 4321 -- ./daemon 4321{hint}"
            )
        self._refuse_root_unless_named()

    # -- where a value comes from ----------------------------------------------

    def _from_file(self, name: str) -> bool:
        return self._ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP

    def _given_options(self) -> list[str]:
        """Return the names of the options that were given, without leading dashes.

        Leaves out an option that is `false` in the file, which is its default.
        """
        return [
            name.replace("_", "-")
            for name, value in self._given.items()
            if value is not False
            and self._ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
        ]

    def _probe(
        self, fill: Callable[[str], str], name: str, read: Callable[[str], ProbeSpec], text: str
    ) -> str:
        """Return a probe with the release's path.  Raises UsageError if no probe can have it."""
        found = fill(text)
        if found == text:
            return text
        with self._about(name):
            try:
                meant = read(text)
                differs = read(found) != replace(meant, path=fill(meant.path))
            except ValueError:
                differs = True
            if differs:
                raise UsageError(
                    f"--{name.replace('_', '-')} {text!r} would become {found!r}: no probe, or one "
                    "with another host or status; write check:COMMAND instead"
                )
            return found
        return text  # the file reports its mistakes together, later

    def _about(self, name: str) -> AbstractContextManager[None]:
        return self._about_file(self._from_file(name), name.replace("_", "-"))

    def _about_file(self, in_file: bool, *where: str | int) -> AbstractContextManager[None]:
        if self.file is None:
            return nullcontext()
        return self.file.about(*where) if in_file else self.file.mistakes_first()

    def _path(self, name: str) -> str | None:
        """Return an option's path, resolved from the folder of the command line or of the file."""
        value: str | None = self._given[name]
        folder = self.file.folder if self.file and self._from_file(name) else self.directory
        return release_choice.absolute(folder, value) if value else None

    def _current(self) -> str:
        """Return the link of --current, without a final `/`, which would mean the link's target."""
        path = self._path("current") or ""
        return path.rstrip("/") or path

    # -- the parts -------------------------------------------------------------

    def _listens(self) -> list[Listen]:
        """Return the LISTEN arguments; none if the file has a mistake in one of them."""
        mode = MODES[self._given["handoff"]]
        if self._given["listen"] or self.file is None:
            return [_fitting(parse(each, self.directory), mode) for each in self._given["listen"]]
        found = []
        for index, text in enumerate(self.file.listens):
            with self.file.about("listen", index):
                found.append(_fitting(parse(text, self.file.folder), mode))
        return found if len(found) == len(self.file.listens) else []

    def _command(self) -> tuple[str, ...]:
        """Return the command; a relative path is resolved from the folder where it was written."""
        words, folder = tuple(self._typed_command), self.directory
        if not words and self.file is not None:
            words, folder = self.file.command, self.file.folder
        if self._given["shell"]:
            return words  # a shell command, not a path
        name = words[0] if words else ""
        path = release_choice.absolute(folder, name) if "/" in name else name
        return (path, *words[1:]) if words else ()

    def _table(self, name: str) -> dict[str, str]:
        """Return a repeatable option's entries by name; the command line overrides the file."""
        in_file = self.file.tables.get(name, {}) if self.file else {}
        return {**in_file, **dict(self._given[name])}

    def _limits(self) -> dict[str, int]:
        found = {}
        for name, value in self._table("limit").items():
            with self._about_file(name not in dict(self._given["limit"]), "limit", name):
                found[name] = option_values.limit(name, value)
        return found

    @property
    def _is_read_again(self) -> bool:
        """Whether a reload reads the options again: the file or `current` may have changed."""
        return self.file is not None or bool(self._given["releases"])

    def _choose_release(
        self,
        command: tuple[str, ...],
        identity: Identity | None,
        worker_identity: Identity | None,
    ) -> None:
        """With --releases, choose the release whose path replaces {release}."""
        given, running = self._given, self._running
        releases, current = self._path("releases"), self._current()
        release_choice.check_options(given, releases, current, command)
        if not releases or not current:
            return
        files = {
            "--config": self.file.path if self.file else None,
            "--env-file": self._path("env_file"),
            "--chdir": self._path("chdir") or self.directory,
            "the command": command[0] if command and "/" in command[0] else None,
        }
        release_choice.check_files(releases, current, files)
        release_choice.refuse_shared(current)
        if running is None:
            release_choice.refuse_unmovable(current, identity)
        self._release = release_choice.choose(
            *(releases, current, running.release_wanted if running else ""),
            *(given["deployer"], identity, worker_identity),
        )

    def _settings(self, command: tuple[str, ...]) -> Settings:
        """Check the options and resolve their paths."""
        given, running = self._given, self._running
        limits = self._limits()
        nice = limits.pop("nice", 0)
        identity, worker_identity = self._users()
        with self._about("releases" if given["releases"] else "current"):
            self._choose_release(command, identity, worker_identity)
        if given["releases"] and not self._release.path and self.file is not None:
            self.file.refuse_if_mistaken()  # other options need the path of the release
        fill = partial(release.fill, path=self._release.path)
        probe = partial(self._probe, fill)
        command = tuple(map(fill, command))
        directory = fill(self._path("chdir") or self.directory)
        with self._about("chdir"):
            if not os.path.isdir(directory):
                raise UsageError(f"--chdir {given['chdir']}: no such directory")
        umask = running.origin.umask if running else os.umask(0o022)
        if running is None:
            os.umask(umask)
        default_name = os.path.basename("sh" if given["shell"] else [*command, ""][0])[:_NAME_CHARS]
        name = given["name"] or ""
        with self._about("name"):
            if running is None and ("/" in name or name in _NO_NAMES):
                raise UsageError(
                    f"--name {name}: no instance can have this name, because the name is part "
                    "of a path; choose a name without / that is not . or .."
                )
        mode = MODES[given["handoff"]]
        ready = given["ready"] or Ready(mode.ready, mode.ready_after_s)
        groups = {}
        for field in ("control_group", "status_group"):
            with self._about(field):
                if given[field] is not None:
                    groups[field] = users.gid_of(f"--{field.replace('_', '-')}", given[field])
        default = users.status_group(os.environ)
        # A group that was made after the start takes effect at a restart, and stops no reload.
        if default is not None and (running is None or running.status_group is not None):
            groups.setdefault("status_group", default)
        connections, spread = given["retire_after"]
        values = {each.field: given[str(each.name)] for each in OPTIONS if each.field}
        values |= {
            "name": given["name"] or (running.name if running else default_name),
            "command": command,
            "directory": directory,
            "policy.stop_first": given["reload_order"] == STOP_FIRST.name,
            **_rollout(given),
            "policy.workers_accept": mode.workers_accept,
            "policy.settle_check": probe(
                "settle_check", probe_spec.read_settle_check, given["settle_check"] or ""
            ),
            "policy.ready": mode.ready_hint or ready.kind,
            "pools": os.cpu_count() or 1,
            "workers": given["workers"] or mode.workers,
            "ready": ready.kind,
            "ready_after_s": ready.after_s,
            "ready_fd": ready.fd,
            "ready_check": fill(ready.check),
            "ready_question": probe("ready", probe_spec.read, ready.question),
            "health": probe("health", probe_spec.read_health, given["health"] or ""),
            "identity": identity,
            "worker_identity": worker_identity,
            "umask": umask if given["umask"] is None else given["umask"],
            "nofile_soft": option_values.nofile_of_workers(os.environ),
            "nice": nice,
            "limits": tuple(limits.items()),
            "batch": scheduler() == os.SCHED_BATCH,
            "environment": tuple((k, fill(v)) for k, v in self._table("env").items()),
            "keep_env": () if given["clear_env"] and not given["keep_env"] else given["keep_env"],
            "env_file": fill(self._path("env_file") or "") or None,
            **{name: self._path(name) for name in ("pid_file", "log_file")},
            "releases": self._path("releases") or "",
            "current": self._current(),
            "release": self._release.name,
            "log_level": "debug" if given["verbose"] else given["log_level"],
            "log_relay": not given["no_log_relay"],
            "watch": preflight.resolve_watched(given["watch"], self.directory),
            "outlives_terminal": signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,
            "worker_limits.connections": connections,
            "worker_limits.spread": spread,
            **groups,
            "secret": os.urandom(12).hex(),
            "origin": Origin(self._words, self.directory, umask, self._is_read_again),
        }
        return _settings(values)


def _rollout(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that --canary and --reload-order rolling set."""
    found: dict[str, Any] = {}
    if given["canary"]:
        share = Canary(given["canary"], given["canary_for"], given["canary_at_least"])
        found["policy.canary"] = share
    if given["reload_order"] == ROLLING.name:
        found["policy.surge"], found["policy.surge_is_percent"] = given["surge"]
    return found


def _settings(values: Mapping[str, Any]) -> Settings:
    """Return settings from fields by name; `policy.settle_s` is a field of the part `policy`."""
    parts: dict[str, dict[str, Any]] = {"": {}, "policy": {}, "worker_limits": {}}
    for name, value in values.items():
        part, _, field = name.rpartition(".")
        parts[part][field] = value
    policy, limits = Policy(**parts["policy"]), Limits(**parts["worker_limits"])
    return Settings(**parts[""], policy=policy, worker_limits=limits)


def _fitting(listen: Listen, mode: HandoffMode) -> Listen:
    """Return an argument; if workers accept, a port alone becomes one socket, not two.

    Raises UsageError for an option that we would have to set on each accepted connection.
    """
    if not mode.workers_accept:
        return listen
    if "priority" in listen.options:
        raise UsageError(
            f"{listen.text}: ?priority= does not work with --handoff {mode.name}; set SO_PRIORITY "
            "in the server"
        )
    if listen.host or listen.path or listen.passed:
        return listen
    return replace(listen, options={"v6only": "0", **listen.options})
