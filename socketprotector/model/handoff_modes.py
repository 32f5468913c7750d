"""The handoff modes: what each can do, and the options and commands each refuses.

Pure.  Under `connection` we accept, and workers take connections from their generation's queue
(docs/protocol.md); under `stdio` and `legacy` a program of ours does that in the command's place.
Under `listener` workers accept by themselves, from listening sockets that they share with us.

No other module compares a mode's name, which is what the command line, settings, state and JSON
have: a new mode is a new value here, and a new capability where an existing one does not say it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .lazy_dataclass import field, frozen


@frozen
class HandoffMode:
    """What follows from one --handoff."""

    name: str
    workers_accept: bool = False  # else we do, and connections go through a queue
    adapter: str = ""  # the module of programs/ that runs as the worker, started with the command
    pooled: bool = False  # each connection is a process: --workers limits how many there are
    knows_ports_alone: bool = False  # no UNIX socket: a worker asks for a listener by its port
    workers: int = 1  # where --workers is not given
    ready: str = "notify"  # the same of --ready
    ready_after_s: float | None = None
    ready_hint: str = ""  # of core/start_timeout.py's, where --ready does not say it
    #: Options that it has no use for, and why, in words.
    refuses: Mapping[str, str] = field(default_factory=dict)
    #: Control commands that it cannot carry out, and why.
    cannot: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_library(self) -> bool:
        """Whether the command itself takes connections from the queue."""
        return not (self.workers_accept or self.adapter)

    def refused(self, given: Collection[str]) -> str | None:
        """Say which of the options given it refuses, and why; None: none of them.

        given: names of options without their dashes.
        """
        for option in given:
            if option in self.refuses:
                return f"--{option} with --handoff {self.name}: {self.refuses[option]}"
        return None


#: Where a generation cannot be asked, or a worker joins one that serves, and says nothing: it is
#: taken as ready when it has lived so long.
ALIVE_S = 1.0
NEEDS_LISTENER = "it needs --handoff listener"
_DRAIN_SIGNAL = {"drain-signal": NEEDS_LISTENER}
_SHELL = {"shell": "it needs --handoff stdio"}
_COUNTS = {"retire-after": "workers on the client library alone count their connections"}
_READY = {"ready": "the adapter says when it is ready; leave --ready out"}
_IDLE = {"lame-duck-idle": "the kernel does not tell when a client has come; leave it out"}

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
    refuses={**_COUNTS, **_DRAIN_SIGNAL, **_READY},
    cannot={
        "scale": "under --handoff stdio --workers is how many programs run at once: "
        "change it and reload",
        "dry-run": "under --handoff stdio the first client starts the release, which can be asked "
        "nothing before that",
    },
)
LEGACY = HandoffMode(
    "legacy",
    adapter="legacy.adapter",
    knows_ports_alone=True,
    ready_hint="legacy",
    refuses={**_COUNTS, **_DRAIN_SIGNAL, **_SHELL, **_READY},
)
#: By name, in the order in which --help shows them.
MODES = {each.name: each for each in (CONNECTION, LISTENER, STDIO, LEGACY)}
