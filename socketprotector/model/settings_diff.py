"""What differs between two settings, one line for each key; and what may not, at a reload.

Pure.  For people: of environment and command only names are told; the rest may be secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from .policy import Policy
from .settings import Identity, Limits, ListenerSettings, Settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RESTART = "needs a restart"

#: Key and kind of each field that may change; the kinds are below.
_CHANGES: Mapping[str, tuple[str, str]] = {
    "directory": ("chdir", "text"),
    "workers": ("workers", "text"),
    "shell": ("shell", "text"),
    "drain_signal": ("drain-signal", "text"),
    "queue": ("queue", "text"),
    "umask": ("umask", "octal"),
    "env_file": ("env-file", "text"),
    "keep_env": ("keep-env", "names"),
    "log_level": ("log-level", "text"),
    "watchdog_s": ("watchdog", "seconds"),
}
_POLICY: Mapping[str, tuple[str, str]] = {
    "start_tries": ("start-tries", "text"),
    "start_timeout_s": ("start-timeout", "seconds"),
    "settle_s": ("settle", "seconds"),
    "drain_timeout_s": ("drain-timeout", "seconds"),
    "max_draining": ("max-draining", "text"),
    "stop_timeout_s": ("stop-timeout", "seconds"),
    "kill_timeout_s": ("kill-timeout", "seconds"),
    "stop_first": ("reload-order", "order"),
}
_LIMITS: Mapping[str, tuple[str, str]] = {
    "requests": ("max-requests", "text"),
    "requests_spread": ("max-requests (spread)", "text"),
    "memory_bytes": ("max-memory", "text"),
    "age_s": ("max-age", "seconds"),
}
#: What the process, its files and its user are made from.
_FIXED: Mapping[str, tuple[str, str]] = {
    "name": ("name", "text"),
    "handoff": ("handoff", "text"),
    "identity": ("user", "user"),
    "worker_identity": ("worker-user", "user"),
    "no_new_privileges": ("no-new-privs", "text"),
    "pid_file": ("pid-file", "text"),
    "log_file": ("log-file", "text"),
    "log_format": ("log-format", "text"),
    "log_relay": ("no-log-relay", "not"),
    "log_prefix": ("log-prefix", "text"),
    "foreground": ("foreground", "text"),
    "guarded": ("guard", "text"),
    "busy_poll_s": ("busy-poll", "seconds"),
    "control_group": ("control-group", "text"),
}
#: Told in another way (listeners, tables), or nobody's wish.
_ELSEWHERE = frozenset(
    {"command", "listeners", "policy", "worker_limits", "limits", "nice", "environment"}
    | {"nofile_soft", "batch", "outlives_terminal", "secret", "notices", "origin", "control"}
    | {"notify_folder"}
    | {"watch", "pools", "ready", "ready_after_s", "ready_fd", "ready_check"}
)

_SHOWN: Mapping[str, Callable[[Any], str]] = {
    "text": lambda value: "none" if value is None else str(value).lower(),
    "not": lambda value: str(not value).lower(),
    "names": lambda value: "all" if value is None else ",".join(value) or "none",
    "octal": lambda value: f"{value:04o}",
    "seconds": lambda value: f"{value:g} s",
    "order": lambda value: "stop-first" if value else "start-first",
    "user": lambda value: "none" if value is None else f"{value.user} (group {value.gid})",
}


def changes(old: Settings, new: Settings) -> Iterator[str]:
    """Tell what a reload changes: `workers: 2 -> 4`, `listen: + tcp:0.0.0.0:81`, `env: A`."""
    for field, (key, kind) in _CHANGES.items():
        yield from _told(key, kind, getattr(old, field), getattr(new, field))
    yield from _told("ready", "text", _ready(old), _ready(new))
    if old.ready_check != new.ready_check:
        yield "ready: another check"  # there may be something secret in it
    yield from _command((*old.executed[:1], *old.command), (*new.executed[:1], *new.command))
    for field, (key, kind) in _POLICY.items():
        yield from _told(key, kind, getattr(old.policy, field), getattr(new.policy, field))
    for field, (key, kind) in _LIMITS.items():
        before, after = getattr(old.worker_limits, field), getattr(new.worker_limits, field)
        yield from _told(key, kind, before, after)
    was, will = ({**dict(each.limits), "nice": each.nice} for each in (old, new))
    for name in dict.fromkeys((*was, *will)):
        yield from _told(f"limit.{name}", "text", was.get(name), will.get(name))
    before, after = dict(old.environment), dict(new.environment)
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            mark = "-" if name not in after else "+" if name not in before else "changed"
            yield f"env: {mark} {name}"
    yield from _listeners(old.listeners, new.listeners)


def _ready(settings: Settings) -> str:
    match settings.ready:
        case "after":
            return f"after:{settings.ready_after_s or 0:g}s"
        case "fd":
            return f"fd:{settings.ready_fd}"
        case kind:
            return kind


def _command(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """Tell the program alone: an argument may be secret."""
    if old[:1] != new[:1]:
        yield f"command: {old[0]} -> {new[0]}"
    elif old != new:
        yield "command: other arguments"


def forbidden(old: Settings, new: Settings) -> Iterator[str]:
    """Tell what would have to change and cannot while the process lives."""
    for field, (key, kind) in _FIXED.items():
        before, after = getattr(old, field), getattr(new, field)
        if isinstance(before, Identity) and isinstance(after, Identity):
            # What else is known of the user is looked up anew, and is that of the start for life.
            after = replace(after, groups=before.groups, home=before.home, shell=before.shell)
        yield from _told(key, kind, before, after)


def known() -> dict[type, set[str]]:
    """Return the fields that something is said about, by class; for a test."""
    return {
        Settings: {*_CHANGES, *_FIXED, *_ELSEWHERE},
        Policy: {*_POLICY},
        Limits: {*_LIMITS},
    }


def _told(key: str, kind: str, before: Any, after: Any) -> Iterator[str]:
    if before != after:
        shown = _SHOWN[kind]
        yield f"{key}: {shown(before)} -> {shown(after)}"


def _listeners(old: Sequence[ListenerSettings], new: Sequence[ListenerSettings]) -> Iterator[str]:
    for index, each in enumerate(new):
        was = index < len(old) and not old[index].removed
        if was and each.removed:
            yield f"listen: - {each.address}"
        elif not was and not each.removed:
            yield f"listen: + {each.address}"
