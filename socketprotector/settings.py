"""What the operator asked for, checked and resolved, as one frozen value.

Pure.  The launching process makes it; the resident process reads it back from a
memfd (`dump` and `load` are the two sides).  Units are in the names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from .fleet import Policy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


@dataclass(frozen=True, slots=True)
class ListenerSettings:
    """One bound socket: its canonical address and, for a UNIX path, the file that is ours."""

    address: str  # tcp:HOST:PORT, tcp:[HOST6]:PORT, unix:/path, unix:@name
    device: int = 0  # st_dev and st_ino of the socket file, 0 without one
    inode: int = 0
    backlog: int = 0  # of a UNIX socket: whoever listens says it
    foreign: bool = False  # given to us by somebody who goes on listening (socket activation)


@dataclass(frozen=True, slots=True)
class Identity:
    """The user that everything runs as after the start."""

    user: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the resident process needs to know."""

    name: str
    command: tuple[str, ...]
    directory: str  # where workers start, by path: a `current` symlink is followed at each reload
    listeners: tuple[ListenerSettings, ...] = ()
    policy: Policy = field(default_factory=Policy)
    workers: int = 1
    ready_after_s: float | None = None  # None: READY=1 is waited for
    queue: int = 256
    identity: Identity | None = None
    worker_identity: Identity | None = None  # None: the same
    no_new_privileges: bool = False
    umask: int = 0o022
    nofile_soft: int = 1024  # what the caller had; the protector raises its own
    limits: tuple[tuple[str, int], ...] = ()  # of workers: nofile, core
    nice: int = 0
    batch: bool = False  # the caller's scheduling policy was SCHED_BATCH
    environment: tuple[tuple[str, str], ...] = ()
    env_file: str | None = None
    pid_file: str | None = None
    log_file: str | None = None
    log_level: str = "info"
    log_format: str = "text"
    foreground: bool = False
    guarded: bool = False
    outlives_terminal: bool = False  # HUP was ignored at start (nohup)
    secret: str = ""  # part of each worker's notify address, so that nobody can guess it
    notices: tuple[str, ...] = ()  # what the operator was told at the start: for the log too

    def listening(self, listeners: tuple[ListenerSettings, ...]) -> Settings:
        """The same with the sockets that have been bound."""
        return replace(self, listeners=listeners)

    def noticed(self, notices: Sequence[str]) -> Settings:
        """The same with what the operator was told."""
        return replace(self, notices=tuple(notices))


def dump(settings: Settings) -> bytes:
    """Return settings as bytes that `load` reads back."""
    return json.dumps(asdict(settings)).encode()


def load(data: bytes) -> Settings:
    """Return the settings `dump` wrote.  Raises ValueError or TypeError for anything else."""
    values = json.loads(data)
    return Settings(
        **{
            **values,
            "command": tuple(values["command"]),
            "listeners": tuple(ListenerSettings(**each) for each in values["listeners"]),
            "policy": Policy(**values["policy"]),
            "identity": _identity(values["identity"]),
            "worker_identity": _identity(values["worker_identity"]),
            "limits": tuple((name, value) for name, value in values["limits"]),
            "environment": tuple((name, value) for name, value in values["environment"]),
            "notices": tuple(values["notices"]),
        }
    )


def _identity(values: dict[str, Any] | None) -> Identity | None:
    return Identity(**{**values, "groups": tuple(values["groups"])}) if values else None
