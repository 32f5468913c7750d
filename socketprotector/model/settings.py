"""The operator's settings, checked and resolved, as one frozen value.

Pure.  The launching process makes the settings and writes them to a memfd (`dump`); the resident
process reads them from there (`load`).  Units are in the names.

A newer program reads an older program's settings; a missing field takes its default.  An older
program refuses settings with a field that it does not know: otherwise it would silently drop an
option.  For the same reason it refuses a value that it does not know.
"""

from __future__ import annotations

from . import json_text, probe_spec
from .codec import FORMAT, Codec, DecodeError, decoding, need_format, refusal
from .handoff_modes import MODES, HandoffMode
from .lazy_dataclass import field, frozen
from .log_format import FORMATS, LEVELS
from .policy import Policy
from .ready_kinds import KINDS
from .share import Canary
from .text import in_units

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any


class SettingsError(ValueError):
    """The settings cannot be used; the message says why."""


@frozen
class ListenerSettings:
    """One bound socket: its canonical address and, for a UNIX path, our socket file."""

    address: str  # tcp:HOST:PORT, tcp:[HOST6]:PORT, unix:/path, unix:@name
    device: int = 0  # st_dev and st_ino of the socket file, 0 without one
    inode: int = 0
    backlog: int = 0  # of a UNIX socket, for the sockets that later take its path
    foreign: bool = False  # passed in by a service manager, which keeps listening
    text: str = ""  # the LISTEN argument
    nonblock: bool = False  # workers get the socket with O_NONBLOCK
    priority: int = -1  # SO_PRIORITY for each connection (not inherited); -1: the default
    name: str = ""  # from NAME=LISTEN, or the port, or the file's name
    removed: bool = False  # by a reload; its index is never used again
    # The path leads to several sockets in turn (system/socket_file.py).  An older protector, which
    # lacks this field, refuses the settings: it would leave the path at a socket without workers.
    beside: bool = False


@frozen
class Origin:
    """The caller's command line and surroundings, for reading the configuration file again."""

    words: tuple[str, ...] = ()  # the command line
    directory: str = "/"
    umask: int = 0o022
    configured: bool = False  # a reload reads the options again (--config or --releases)


@frozen
class Identity:
    """A user to run as."""

    user: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str = ""
    shell: str = ""


@frozen
class Limits:
    """The limits at which a worker is replaced; 0: never."""

    connections: int = 0
    spread: int = 0  # each worker's limit of connections varies by up to this
    memory_bytes: int = 0
    age_s: float = 0.0

    @property
    def any(self) -> bool:
        return bool(self.connections or self.memory_bytes or self.age_s)


@frozen
class Settings:
    """All settings of the resident process."""

    name: str
    command: tuple[str, ...]
    directory: str  # where workers start: a path, whose symlinks are followed at each reload
    listeners: tuple[ListenerSettings, ...] = ()
    policy: Policy = field(default_factory=Policy)
    handoff: str = "connection"  # see handoff_modes.py
    shell: bool = False  # stdio: COMMAND is for /bin/sh
    pools: int = 1  # stdio: the limit of processes that start programs, one for each core
    drain_signal: int = 15  # listener: the signal that makes a worker finish
    workers: int = 1
    ready: str = "notify"  # the kind of --ready: see ready_kinds.py
    ready_after_s: float | None = None  # the timer of `after` and of probed kinds
    ready_fd: int = -1  # the descriptor's number in the worker, for kind fd
    ready_check: str = ""  # the command for /bin/sh, for kind check
    ready_question: str = ""  # the probe of a probed kind: see model/probe_spec.py
    health: str = ""  # the check of the serving generation: see model/probe_spec.py; "": none
    health_every_s: float = 5.0
    health_failures: int = 3  # unhealthy after so many failed checks without a good one
    health_timeout_s: float = 2.0
    queue: int = 256
    busy_poll_s: float = 0.0002  # how long to poll for an expected connection before sleeping
    identity: Identity | None = None
    worker_identity: Identity | None = None  # None: the same as identity
    no_new_privileges: bool = False
    umask: int = 0o022
    nofile_soft: int = 1024  # the caller's limit; the protector raises its own
    limits: tuple[tuple[str, int], ...] = ()  # resource limits of workers: nofile, core
    nice: int = 0
    keep_env: tuple[str, ...] | None = None  # the inherited variables that workers get; None: all
    batch: bool = False  # the scheduling policy of the caller was SCHED_BATCH
    environment: tuple[tuple[str, str], ...] = ()
    env_file: str | None = None
    pid_file: str | None = None
    log_file: str | None = None
    log_level: str = "info"
    log_format: str = "text"
    log_relay: bool = True  # workers write through the relay, unless to a terminal or a file
    log_prefix: bool = False  # lines of workers begin with [GENERATION PID]
    watch: tuple[str, ...] = ()  # paths whose changes cause a reload
    releases: str = ""  # the folder of releases; "": there are none
    current: str = ""  # the symbolic link that names the release to start
    release: str = ""  # the name of the release that these settings are for
    release_wanted: str = ""  # the release that a deploy named; "": use the one in `current`
    foreground: bool = False
    guarded: bool = False
    outlives_terminal: bool = False  # HUP was ignored at start (nohup)
    watchdog_s: float = 0.0  # the longest silence of a worker that has sent WATCHDOG=1
    worker_limits: Limits = field(default_factory=Limits)
    control: ListenerSettings | None = None  # the control socket
    control_group: int | None = None  # the group whose members may also use it
    status_group: int | None = None  # the group whose members may read status and events
    secret: str = ""  # part of each worker's notify address, so that it cannot be guessed
    notify_folder: str = ""  # the folder of notify addresses; "": they are abstract
    notices: tuple[str, ...] = ()  # lines for the operator at the start, and for the log
    warnings: tuple[str, ...] = ()  # defects of these settings, shown while they are in use
    origin: Origin = field(default_factory=Origin)

    @property
    def finish_signal(self) -> int:
        """The signal that makes a worker finish; 0: none, the worker reads end of file."""
        return self.drain_signal if self.mode.workers_accept else 0

    @property
    def mode(self) -> HandoffMode:
        """How connections reach the workers."""
        return MODES[self.handoff]

    @property
    def processes(self) -> int:
        """The number of workers in a generation; under stdio, a few pools start all programs."""
        return min(self.workers, self.pools) if self.mode.pooled else self.workers

    def ready_text(self, *, in_status: bool = False) -> str:
        """Return --ready as it is written, or as status shows it, without its command."""
        kind, after = KINDS[self.ready], in_units(self.ready_after_s or 0.0)
        text = (kind.shown if in_status else "") or kind.written or self.ready
        return text.format(after=after, fd=self.ready_fd, question=self.ready_question)

    @property
    def to_syslog(self) -> bool:
        """Whether the log and the workers' output go to syslog only."""
        return not self.foreground and self.log_file is None

    @property
    def executed(self) -> tuple[str, ...]:
        """The executed words: the command, or the shell that reads it."""
        return ("/bin/sh",) if self.shell else self.command


#: All classes of settings.  An unknown field is refused: dropping it would drop an option.
CLASSES = (Settings, ListenerSettings, Policy, Canary, Identity, Limits, Origin)
#: Newer fields, which are not written if they have their defaults.  After a package update, the
#: running older protector gets its settings from the new package's code.  So it refuses only
#: settings that it cannot honour.
ADDED = (
    *("Settings.warnings", "ListenerSettings.beside"),
    *("Policy.canary", "Policy.surge", "Policy.surge_is_percent"),
    *("Settings.releases", "Settings.current", "Settings.release", "Settings.release_wanted"),
    *("Policy.drain_spread_s", "Policy.stop_spread_s"),
)
#: Fields that are only for people; an older program skips them.
SAID = ("Settings.warnings",)
#: The resource limits of --limit.
LIMITS = ("nofile", "core")


def _are_limits(pairs: Iterable[tuple[str, int]]) -> bool:
    return all(name in LIMITS for name, _ in pairs)


def _is_address(text: str) -> bool:
    return text.startswith(("tcp:", "unix:"))


def _is_probe(text: str) -> bool:
    return not text or _is_read_by(probe_spec.read, text)


def _is_health_check(text: str) -> bool:
    return not text or _is_read_by(probe_spec.read_health, text)


def _is_settle_check(text: str) -> bool:
    # Not by read_settle_check(), which would take an unknown kind as a command.
    return text != "accept" and _is_health_check(text)


def _is_read_by(read: Callable[[str], object], text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True


_OF_PROGRAMS: dict[str, Callable[[Any], bool]] = {
    "handoff": MODES.__contains__,
    "ready": KINDS.__contains__,
    "ready_question": _is_probe,
    "limits": _are_limits,
}
#: Fields to which a later version may add values -> whether this program knows a value.
CHECKS: dict[str, Callable[[Any], bool]] = {
    **{f"Settings.{name}": knows for name, knows in _OF_PROGRAMS.items()},
    "Settings.health": _is_health_check,
    "Settings.log_level": LEVELS.__contains__,
    "Settings.log_format": FORMATS.__contains__,
    "ListenerSettings.address": _is_address,
    "Policy.ready": KINDS.__contains__,
    "Policy.settle_check": _is_settle_check,
}
#: The same for each generation's Program (records.py).
PROGRAM_CHECKS: dict[str, Callable[[Any], bool]] = {
    **{f"Program.{name}": knows for name, knows in _OF_PROGRAMS.items()},
    "Program.settle_check": _is_settle_check,
}
_CODEC = Codec(CLASSES, strict=CLASSES, added=ADDED, said=SAID, checks=CHECKS)


def dump(settings: Settings) -> bytes:
    """Return settings as bytes that `load` reads back."""
    return b'{"format":%d,"settings":%b}' % (FORMAT, _CODEC.encode(settings))


def load(data: bytes) -> Settings:
    """Return the settings that `dump` wrote, in this program or an older one.

    Raises SettingsError for a newer program's settings, and for malformed data.
    """
    try:
        with decoding():
            values = json_text.parse(data)
            need_format(values["format"])
            found = _CODEC.value_of(values["settings"])
        if isinstance(found, Settings):
            return found
        raise DecodeError(f"they are {type(found).__name__}")
    except DecodeError as error:
        raise SettingsError(refusal("the settings", error)) from error
