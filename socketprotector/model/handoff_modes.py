"""The handoff modes: the capabilities of each, and the options and commands that each refuses.

Pure.  Under `connection` the protector accepts, and workers take connections from their
generation's queue (docs/protocol.md).  Under `stdio` and `legacy` an adapter of SocketProtector
takes the connections for the command.  Under `listener` workers accept from sockets that the
protector shares.

The command line, settings, state and JSON contain a mode's name, but no other module compares
names.  So a new mode is a new value here, perhaps with a new capability.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .lazy_dataclass import field, frozen


@frozen
class HandoffMode:
    """The capabilities of one --handoff."""

    name: str
    workers_accept: bool = False  # otherwise the protector accepts, and connections are queued
    adapter: str = ""  # the module of programs/ that runs as the worker and starts the command
    pooled: bool = False  # each connection gets a process: --workers limits how many run at once
    knows_ports_alone: bool = False  # no UNIX sockets: a worker identifies a listener by its port
    workers: int = 1  # the default of --workers
    ready: str = "notify"  # the default of --ready
    ready_after_s: float | None = None
    ready_hint: str = ""  # the kind whose hint a start timeout shows; "": that of --ready
    #: Refused options -> the reason.
    refuses: Mapping[str, str] = field(default_factory=dict)
    #: Refused control commands -> the reason.
    cannot: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_library(self) -> bool:
        """Whether the command itself takes connections from the queue."""
        return not (self.workers_accept or self.adapter)

    def refused(self, given: Collection[str]) -> str | None:
        """Return the first refused option with the reason, or None.

        given: the given options' names without dashes.
        """
        for option in given:
            if option in self.refuses:
                return f"--{option} with --handoff {self.name}: {self.refuses[option]}"
        return None


#: A worker that sends no message counts as ready after this long, if its generation cannot be
#: probed, or is serving already.
ALIVE_S = 1.0
NEEDS_LISTENER = "it needs --handoff listener"
_DRAIN_SIGNAL = {"drain-signal": NEEDS_LISTENER}
_SHELL = {"shell": "it needs --handoff stdio"}
_COUNTS = {"retire-after": "only workers on the client library count their connections"}
_SPREAD = dict.fromkeys(
    ("drain-spread", "stop-spread"), "only workers on the Python client library do that"
)
_READY = {"ready": "the adapter reports when it is ready; leave --ready out"}
_IDLE = {"lame-duck-idle": "the protector does not see when clients connect; leave it out"}

CONNECTION = HandoffMode("connection", refuses={**_DRAIN_SIGNAL, **_SHELL})
LISTENER = HandoffMode(
    "listener",
    workers_accept=True,
    ready="any",
    ready_after_s=ALIVE_S,
    refuses={**_SHELL, **_IDLE},
)
STDIO = HandoffMode(
    "stdio",
    adapter="stdio.__main__",
    pooled=True,
    workers=4,
    refuses={**_COUNTS, **_DRAIN_SIGNAL, **_READY, **_SPREAD},
    cannot={
        "scale": "under --handoff stdio --workers limits how many programs run at once: "
        "change `workers` in the configuration file and reload, or restart with another --workers",
        "dry-run": "under --handoff stdio the first client starts the release, so nothing can be "
        "probed before",
    },
)
LEGACY = HandoffMode(
    "legacy",
    adapter="legacy.adapter",
    knows_ports_alone=True,
    ready_hint="legacy",
    refuses={**_COUNTS, **_DRAIN_SIGNAL, **_SHELL, **_READY, **_SPREAD},
)
#: The modes by name, in the order of --help.
MODES = {each.name: each for each in (CONNECTION, LISTENER, STDIO, LEGACY)}
