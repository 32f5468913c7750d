"""Opens probe addresses: each leads an operator's check command to one generation.

The check commands of `--ready check:CMD` and `--settle-check CMD` use these addresses.  The command
of `--health` connects to a ProbeTarget's address instead (delivery/probe_target.py).

A probe address is a loopback port, so the command can use any client program.  The port is open
while its generation is checked.

Under --handoff listener a helper process, the prober (programs/prober.py), forwards the port's
connections to the generation's socket.  For TCP the kernel finds this socket by a mark on the
connection (`Mark` in system/bpf.py).  The check command cannot set the mark, but the prober can.

In other modes the protector itself accepts the port's connections, and sends them into the
generation's channel (delivery/queue/probe_port.py).
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from ..model.lazy_dataclass import field, mutable
from ..system.cleanup import on_error
from ..system.helper import Ended
from ..system.log import Log
from ..system.loop import Loop
from . import prober_client
from .delivery.probe_target import BACKLOG, SHUT_DOWN, ProbeTarget, Reach
from .generation import OpenGeneration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .prober_client import Prober


class Forwarding:
    """A loopback socket, and the prober that forwards the socket's connections to a ProbeTarget."""

    def __init__(
        self, loop: Loop, target: ProbeTarget, ended: Ended, forwarded: Callable[[], None]
    ) -> None:
        """Open the socket and start the prober.  Raises OSError if the socket cannot be opened.

        forwarded: called for each connection to the target.
        ended: called with how the prober ended, or why it could not start.
        """
        self._loop, self._target = loop, target
        self._listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with on_error(self._listening.close):
            self._listening.bind(("127.0.0.1", 0))
            self._listening.listen(BACKLOG)
        self._on_ended, self._forwarded = ended, forwarded
        self._prober: Prober | None = None
        self.start()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listening.getsockname()
        return host, port

    def close(self) -> None:
        if self._prober is not None:
            self._prober.close()
        self._listening.close()

    def start(self) -> None:
        """Start the prober unless it is running."""
        if self._prober is None:
            try:
                self._prober = prober_client.Prober(
                    self._loop,
                    answered=lambda why: self._forwarded(),
                    ended=self._ended,
                    forwards=(self._target, self._listening),
                )
            except OSError as error:
                self._on_ended(f"cannot be started: {error.strerror}")

    def _ended(self, how: str) -> None:
        self._prober = None
        self._on_ended(how)


@mutable
class CheckProbes:
    """The probe addresses of all generations that are being checked."""

    loop: Loop
    log: Log
    reach: Reach
    _open: dict[int, tuple[ProbeTarget, Forwarding | None]] = field(default_factory=dict)

    def address(self, generation: OpenGeneration) -> str:
        """Return a generation's probe address as HOST:PORT; open the address if it is not open.

        Returns "" if no probe is possible.  Raises OSError.
        """
        number = generation.record.number

        def ended(how: str) -> None:
            why = f"the prober {how}"
            self.log.write("warning", "check-unreachable", generation=number, reason=why)

        found = self._open.get(number)
        if found is None:
            target = self.reach(generation, "")
            if target is None:
                return ""
            with on_error(target.close):
                forwarding = None
                if target.needs_forwarding:
                    forwarding = Forwarding(self.loop, target, ended, generation.note_probe)
                found = target, forwarding
            self._open[number] = found
        elif found[1] is not None:
            found[1].start()  # start the prober again if it has ended
        target, forwarding = found
        host, port = forwarding.address if forwarding is not None else target.address
        return f"{host}:{port}"

    def judge(self, generation: OpenGeneration, why: str) -> str:
        """Return `why`, or SHUT_DOWN if the check's command may have reached another generation.

        why: why the command failed; "": the command succeeded.

        Before returning SHUT_DOWN, release the address: the next command then gets another address.
        """
        number = generation.record.number
        target, _ = self._open.get(number, (None, None))
        if target is None or target.is_unchanged():
            return why
        self.release(number)
        return SHUT_DOWN

    def release(self, number: int) -> None:
        target, forwarding = self._open.pop(number, (None, None))
        if forwarding is not None:
            forwarding.close()
        if target is not None:
            target.close()

    def release_all(self) -> None:
        for number in tuple(self._open):
            self.release(number)
