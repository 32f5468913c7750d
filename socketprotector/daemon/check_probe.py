"""Where a command of --ready check: or --settle-check reaches the generation that it is to check.

With any client: each has an address of loopback, while it is checked.  In its channel is what comes
there; under --handoff listener a helper process forwards it (programs/asker.py), as no process but
ours connects in a way by which the kernel knows which generation is meant.
"""

from __future__ import annotations

import socket

from ..model.lazy_dataclass import field, mutable
from ..system.cleanup import on_error
from ..system.helper import Ended
from ..system.log import Log
from ..system.loop import Loop
from . import asker_client
from .delivery.way import BACKLOG, SHUT_DOWN, Reach, Way
from .generation import OpenGeneration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .asker_client import Asker


class Forwarding:
    """A process that forwards what comes to a socket of ours; there may be another one later."""

    def __init__(self, loop: Loop, way: Way, ended: Ended) -> None:
        """Open the socket and start it.  Raises OSError.

        ended: called with how it has ended, or why none could be started.
        """
        self._loop, self._way = loop, way
        self._listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with on_error(self._listening.close):
            self._listening.bind(("127.0.0.1", 0))
            self._listening.listen(BACKLOG)
        self._tell = ended
        self._asker: Asker | None = None
        self.go_on()

    @property
    def address(self) -> tuple[str, int]:
        """Where what is to be forwarded comes."""
        host, port = self._listening.getsockname()
        return host, port

    def close(self) -> None:
        """Forward nothing more."""
        if self._asker is not None:
            self._asker.close()
        self._listening.close()

    def go_on(self) -> None:
        """Have a process that forwards, if there is none."""
        if self._asker is None:
            try:
                self._asker = asker_client.Asker(
                    self._loop, ended=self._ended, forwards=(self._way, self._listening)
                )
            except OSError as error:
                self._tell(f"cannot be started: {error.strerror}")

    def _ended(self, how: str) -> None:
        self._asker = None
        self._tell(how)


@mutable
class CheckProbes:
    """The addresses, by generation."""

    loop: Loop
    log: Log
    reach: Reach
    _open: dict[int, tuple[Way, Forwarding | None]] = field(default_factory=dict)

    def address(self, generation: OpenGeneration) -> str:
        """Return where a generation is reached, "" where it cannot be.  Raises OSError."""
        number = generation.record.number

        def ended(how: str) -> None:
            why = f"the process that forwards {how}"
            self.log.write("warning", "check-unreachable", generation=number, reason=why)

        found = self._open.get(number)
        if found is None:
            way = self.reach(generation, "")
            if way is None:
                return ""
            with on_error(way.close):
                found = way, Forwarding(self.loop, way, ended) if way.is_ours_alone else None
            self._open[number] = found
        elif found[1] is not None:
            found[1].go_on()
        way, forwarding = found
        host, port = forwarding.address if forwarding is not None else way.address
        return f"{host}:{port}"

    def judge(self, generation: OpenGeneration, why: str) -> str:
        """Return why what a command has answered is not good, "" if it is.

        why: what it says itself.  It may have reached another generation: then the next command
        gets another address.
        """
        number = generation.record.number
        way, _ = self._open.get(number, (None, None))
        if way is None or way.holds():
            return why
        self.over(number)
        return SHUT_DOWN

    def over(self, number: int) -> None:
        """No worker of this generation is checked any more."""
        way, forwarding = self._open.pop(number, (None, None))
        if forwarding is not None:
            forwarding.close()
        if way is not None:
            way.close()

    def all_over(self) -> None:
        """None is in this program."""
        for number in tuple(self._open):
            self.over(number)
