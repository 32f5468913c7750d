"""What the operator asked for, checked and resolved, as one frozen value.

Pure.  The launching process makes it; the resident process reads it back from a
memfd (`dump` and `load` are the two sides).  Units are in the names.

A newer program reads what an older one wrote: what it does not find takes its default.  The
other way round is refused in words, or an option would be dropped without a word.
"""

from __future__ import annotations

from . import json_text
from .codec import FORMAT, Codec, DecodeError, NewerError, decoding, need_format, refusal
from .handoff_modes import MODES, HandoffMode
from .lazy_dataclass import field, frozen
from .policy import Policy


class SettingsError(ValueError):
    """The settings cannot be used; the message says why."""


@frozen
class ListenerSettings:
    """One bound socket: its canonical address and, for a UNIX path, the file that is ours."""

    address: str  # tcp:HOST:PORT, tcp:[HOST6]:PORT, unix:/path, unix:@name
    device: int = 0  # st_dev and st_ino of the socket file, 0 without one
    inode: int = 0
    backlog: int = 0  # of a UNIX socket, which has to listen again
    foreign: bool = False  # passed in by a service manager, which keeps listening
    text: str = ""  # the LISTEN argument that it is of
    nonblock: bool = False  # workers that it is handed to find it so
    priority: int = -1  # SO_PRIORITY of each connection, which inherits none; -1: the system's
    name: str = ""  # what it is called: NAME=LISTEN, else the port or the file's name
    removed: bool = False  # by a reload; its index is never used again
    # Its path leads to several sockets in turn (system/socket_file.py).  A program that does not
    # know this field refuses to go on: it would leave the path at a socket that no worker has.
    beside: bool = False


@frozen
class Origin:
    """What a configuration file is read again with: as the caller said it, where he was."""

    words: tuple[str, ...] = ()  # the command line
    directory: str = "/"
    umask: int = 0o022
    configured: bool = False  # there is a file


@frozen
class Identity:
    """The user that everything runs as after the start."""

    user: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str = ""
    shell: str = ""


@frozen
class Limits:
    """When a worker makes room for another one; 0: never."""

    connections: int = 0
    spread: int = 0  # the number of each varies by up to this
    memory_bytes: int = 0
    age_s: float = 0.0

    @property
    def any(self) -> bool:
        return bool(self.connections or self.memory_bytes or self.age_s)


@frozen
class Settings:
    """Everything the resident process needs to know."""

    name: str
    command: tuple[str, ...]
    directory: str  # where workers start, by path: a `current` symlink is followed at each reload
    listeners: tuple[ListenerSettings, ...] = ()
    policy: Policy = field(default_factory=Policy)
    handoff: str = "connection"  # see handoff_modes.py
    shell: bool = False  # of stdio: COMMAND is for /bin/sh
    pools: int = 1  # of stdio: processes that start programs, at most; one for each core
    drain_signal: int = 15  # of listener: what tells a worker to finish
    workers: int = 1
    #: What says so: notify, ack, fd, check, after (a timer), any; accept, http and https, where the
    #: generation is asked.
    ready: str = "notify"
    ready_after_s: float | None = None  # the timer of `after` and of those that are asked
    ready_fd: int = -1  # of fd: the number in the worker
    ready_check: str = ""  # of check: for /bin/sh
    ready_question: str = ""  # of those that are asked: see model/question.py
    health: str = ""  # what the generation that serves is asked: see model/question.py; "": nothing
    health_every_s: float = 5.0
    health_failures: int = 3  # bad answers in a row that make it unhealthy
    health_timeout_s: float = 2.0
    queue: int = 256
    busy_poll_s: float = 0.0002  # how long the next connection is waited for awake, if expected
    identity: Identity | None = None
    worker_identity: Identity | None = None  # None: the same
    no_new_privileges: bool = False
    umask: int = 0o022
    nofile_soft: int = 1024  # what the caller had; the protector raises its own
    limits: tuple[tuple[str, int], ...] = ()  # of workers: nofile, core
    nice: int = 0
    keep_env: tuple[str, ...] | None = None  # names of ours that workers get; None: all
    batch: bool = False  # the caller's scheduling policy was SCHED_BATCH
    environment: tuple[tuple[str, str], ...] = ()
    env_file: str | None = None
    pid_file: str | None = None
    log_file: str | None = None
    log_level: str = "info"
    log_format: str = "text"
    log_relay: bool = True  # workers' output goes through the relay where the log is ours
    log_prefix: bool = False  # workers' lines say which one wrote them
    watch: tuple[str, ...] = ()  # paths; a reload when something changes there
    foreground: bool = False
    guarded: bool = False
    outlives_terminal: bool = False  # HUP was ignored at start (nohup)
    watchdog_s: float = 0.0  # how long a worker that has said WATCHDOG=1 may then be silent
    worker_limits: Limits = field(default_factory=Limits)
    control: ListenerSettings | None = None  # the control socket
    control_group: int | None = None  # whose members may use it, too
    status_group: int | None = None  # whose members may ask it for status and events
    secret: str = ""  # part of each worker's notify address, so that it cannot be guessed
    notify_folder: str = ""  # where these addresses are; "": they are abstract
    notices: tuple[str, ...] = ()  # lines for the operator at the start: for the log too
    warnings: tuple[str, ...] = ()  # what these settings lack, until others replace them
    origin: Origin = field(default_factory=Origin)

    @property
    def finish_signal(self) -> int:
        """What has a worker finish; 0: no signal, it reads end of file."""
        return self.drain_signal if self.mode.workers_accept else 0

    @property
    def mode(self) -> HandoffMode:
        """How connections reach the workers."""
        return MODES[self.handoff]

    @property
    def processes(self) -> int:
        """How many workers a generation has: under stdio a few start all programs."""
        return min(self.workers, self.pools) if self.mode.pooled else self.workers

    @property
    def to_syslog(self) -> bool:
        """Whether syslog is the only place for the log and for what workers write."""
        return not self.foreground and self.log_file is None

    @property
    def executed(self) -> tuple[str, ...]:
        """The words that are executed: the command, or the shell that reads it."""
        return ("/bin/sh",) if self.shell else self.command


#: All classes that settings are made of.  A field that one of them does not have is refused, or an
#: option would be dropped without a word.
CLASSES = (Settings, ListenerSettings, Policy, Identity, Limits, Origin)
#: So that an older program, which reads its configuration by this one, is refused only what it
#: cannot do.
ADDED = ("Settings.warnings", "ListenerSettings.beside")
#: Of these what is for people alone: an older program passes over it.
SAID = ("Settings.warnings",)
_CODEC = Codec(CLASSES, strict=CLASSES, added=ADDED, said=SAID)


def dump(settings: Settings) -> bytes:
    """Return settings as bytes that `load` reads back."""
    return b'{"format":%d,"settings":%b}' % (FORMAT, _CODEC.encode(settings))


def load(data: bytes) -> Settings:
    """Return the settings `dump` wrote, here or in an older program.

    Raises SettingsError for a newer program's, and for anything else.
    """
    try:
        with decoding():
            values = json_text.parse(data)
            need_format(values["format"])
            found = _CODEC.value_of(values["settings"])
        if isinstance(found, Settings):
            if MODES.get(found.handoff) is None:
                raise NewerError(f"no --handoff {found.handoff} is known")
            return found
        raise DecodeError(f"they are {type(found).__name__}")
    except DecodeError as error:
        raise SettingsError(refusal("the settings", error)) from error
