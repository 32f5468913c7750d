"""Opens probe addresses: each leads an operator's check command to one generation.

A probe address is a loopback port, so the command can use any client program.  The port is open
while its generation is checked.  Only the user that runs the command, and root, get through: any
local user can connect to the port, so we ask the kernel who has made each connection.

In mode `listener` a helper process, the prober (programs/prober.py), forwards each connection to
the generation's socket.  For TCP the kernel finds this socket by a mark on the connection (`Mark`
in system/bpf.py), which the check command cannot set.  In other modes we send the connection into
the generation's channel (delivery/queue/probe_sender.py).
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress

from ..model.lazy_dataclass import field, mutable
from ..system import loopback, peer_credentials, sock_diag
from ..system.cleanup import on_error
from ..system.helper import Ended
from ..system.listener import TRANSIENT_ERRNOS
from ..system.log import Log
from ..system.loop import Loop
from . import prober_client
from .delivery.probe_target import SHUT_DOWN, ProbeTarget, Reach
from .generation import OpenGeneration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .prober_client import Prober

#: The pause before a port accepts again.
_ACCEPT_AGAIN_S = 0.1


class CheckAddress:
    """A loopback port that leads check commands to one generation."""

    def __init__(
        self,
        loop: Loop,
        generation: OpenGeneration,
        target: ProbeTarget,
        ended: Ended = lambda how: None,
    ) -> None:
        """Open the port.

        ended: called with how the prober ended, or why it could not start.  Raises OSError, also if
        the kernel cannot tell the command's user from others.
        """
        self._loop, self._generation, self._target = loop, generation, target
        self._on_ended = ended
        self._prober: Prober | None = None
        identity = generation.program.identity
        user = os.geteuid() if identity is None else identity.uid
        self._users = peer_credentials.unmistakable_users((0, user))
        if user not in self._users:
            raise OSError(errno.EPERM, f"user {user} has no number of its own in this namespace")
        self._listening = loopback.listen()
        with on_error(self._listening.close):
            try:
                sock_diag.listening(socket.AF_INET, self._listening.getsockname()[1])
            except OSError as error:
                why = f"the kernel does not report who connects (sock_diag): {error.strerror}"
                raise OSError(error.errno, why) from error
            self._watch()

    @property
    def text(self) -> str:
        """HOST:PORT."""
        return "{}:{}".format(*self._listening.getsockname())

    def close(self) -> None:
        self._loop.cancel(self)
        self._loop.unwatch(self._listening.fileno())
        self._listening.close()
        if self._prober is not None:
            self._prober.close()

    def _watch(self) -> None:
        self._loop.watch(self._listening.fileno(), self._accept)

    def _accept(self) -> None:
        """Accept one connection.  Others wait for their turn, so strangers do not delay clients."""
        try:
            connection, _ = self._listening.accept()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRNOS:  # out of descriptors or memory
                self._loop.unwatch(self._listening.fileno())
                self._loop.call_after(self, _ACCEPT_AGAIN_S, self._watch)
            return
        with suppress(OSError):
            if sock_diag.peer_user(connection) in self._users:
                self._forward(connection)
                return
        connection.close()

    def _forward(self, connection: socket.socket) -> None:
        """Send a connection to the generation, and close our copy.  Raises OSError."""
        if self._target.give is not None:
            self._target.give(connection)
            return
        with connection:
            if self._prober is None:
                try:
                    self._prober = prober_client.Prober(
                        self._loop,
                        answered=lambda why: self._generation.note_probe(),
                        ended=self._ended,
                    )
                except OSError as error:
                    self._on_ended(f"cannot be started: {error.strerror}")
                    return
            self._prober.forward(connection, self._target)

    def _ended(self, how: str) -> None:
        self._prober = None
        self._on_ended(how)


@mutable
class CheckProbes:
    """The probe addresses of all generations that are being checked."""

    loop: Loop
    log: Log
    reach: Reach
    _open: dict[int, tuple[ProbeTarget, CheckAddress]] = field(default_factory=dict)

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
                found = target, CheckAddress(self.loop, generation, target, ended)
            self._open[number] = found
        return found[1].text

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
        if number in self._open:
            target, address = self._open.pop(number)
            address.close()
            target.close()

    def release_all(self) -> None:
        for number in tuple(self._open):
            self.release(number)
