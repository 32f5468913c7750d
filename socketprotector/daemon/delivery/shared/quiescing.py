"""When a generation whose turn is over has accepted and read from all its clients.

It gets no new clients any more, and may have some that it has not accepted, or not read from: a
server that is told to finish closes those.  The kernel tells which there are (sock_diag); it is
asked again and again, at most a tenth of our time.  Where it does not tell, only time counts.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from functools import partial

from ....model.lazy_dataclass import mutable
from ....system.listener import SCARCE, Listener
from ....system.sock_diag import accepted_unix, handshakes_by_port, unread_by_port
from ....system.socket_file import path_of
from ...runtime import Runtime
from .accept_watch import ASKING_SHARE

_LOOK_S = 0.1
#: The same where the workers read from all that they have accepted before they leave: only those
#: who are about to connect are waited for.
_LOOK_SOON_S = 0.01
_SOON_LOOKS = 2
#: For how long all clients that had come must have been read from.
QUIET_S = 1.0
#: How long to wait for clients that have connected and send nothing.
SILENT_S = 3.0
#: After that long a generation is told to finish even if it has not read from all of them.
LAST_S = 10.0


@mutable
class _Generation:
    """One that gets no new clients any more."""

    socket_number: int
    over: Callable[[], None]
    common: Sequence[Listener]  # without a second socket, and maybe with a backlog
    reads_on: bool  # told to finish, its workers read from all that they have accepted
    began: float
    # In seconds as planned, not as passed: while the machine was suspended no worker could read.
    delay_s: float = 0.0  # before this look
    waited_s: float = 0.0
    quiet_s: float = 0.0
    quiet_looks: int = 0
    # Clients that had come before, and whether each is silent; None: yet to be asked for.
    unread: dict[tuple[int, bytes], bool] | None = None


def _unread_unix(
    listeners: Sequence[Listener], socket_number: int, replaced: Sequence[Listener]
) -> dict[tuple[int, bytes], bool]:
    """Return what Quiescing asks for of UNIX sockets.  Raises OSError.

    Which of the accepted ones has sent nothing at all is not known: none is waited for.

    replaced: those whose socket was bound in the place of the generation's own.  The name of that
    one is not known any more: it is any of its path that no socket has now.
    """
    by_name = {each.socket_for(socket_number).getsockname(): each.index for each in listeners}
    by_path = {each.path: each.index for each in replaced}
    now = {one.getsockname() for each in replaced for one in each.sockets}
    found: dict[tuple[int, bytes], bool] = {}
    for name, inode, unread in accepted_unix():
        index = by_name.get(name)
        if index is None and by_path and name not in now:
            index = by_path.get(path_of(name))
        if unread and index is not None:
            found[index, b"%d" % inode] = False
    return found


class Quiescing:
    """The generations of which that is awaited."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        own: Callable[[int, int], Sequence[Listener]],
        is_replaced: Callable[[Listener, int], bool],
        clients_wait: Callable[[Listener, int], bool],
        is_steered: Callable[[int], bool],
    ) -> None:
        """own: the listeners whose socket of a number gets no new clients while the other one does,
        as far as a generation has them.

        is_replaced: whether another socket was bound in the place of that of a generation.
        clients_wait: whether any do at a socket, by its number; questions of ours do not count.
        is_steered: whether no new client comes to a generation.
        """
        self._loop, self._log = runtime.loop, runtime.log
        self._own, self._is_replaced = own, is_replaced
        self._clients_wait, self._is_steered = clients_wait, is_steered
        self._generations: dict[int, _Generation] = {}

    def begin(
        self,
        generation: int,
        socket_number: int,
        over: Callable[[], None],
        *,
        common: Sequence[Listener] = (),
        reads_on: bool = False,
    ) -> None:
        """Call back when it has accepted and read from all; reads_on: when it has accepted them.

        socket_number: where it accepts.  common: and these, which have one socket for all.
        """
        self._generations[generation] = _Generation(
            socket_number, over, common, reads_on, began=time.monotonic()
        )
        self._look(generation)

    def end(self, generation: int) -> None:
        """It accepts no more: nothing is to be waited for."""
        if self._generations.pop(generation, None) is not None:
            self._loop.cancel(("quiesce", generation))

    @property
    def generations(self) -> tuple[int, ...]:
        """Those of which that is awaited."""
        return tuple(self._generations)

    def begin_again(self, generation: int) -> None:
        """Clients have come to it until now."""
        its = self._generations[generation]
        its.began, its.waited_s, its.unread = time.monotonic(), 0.0, None
        its.quiet_looks, its.quiet_s = 0, 0.0

    def _look(self, generation: int) -> None:
        its, now = self._generations[generation], time.monotonic()
        # First: clients that come after that are not among those below.
        still_come = not self._is_steered(generation)
        its.common = [each for each in its.common if each.has_waiting()]
        own = self._own(its.socket_number, generation)
        # Also where another socket was bound in the place of its own: it has accepted before.
        pairs = self._own(its.socket_number, 0)
        waiting = any(self._clients_wait(each, its.socket_number) for each in own) or bool(
            its.common
        )
        if still_come:
            self.begin_again(generation)
        left = its.unread
        if left is None:
            # sock_diag knows the port, not the socket: it counts clients of the other one, too.
            # Of these only accepted ones matter: a backlog there is the other generation's.
            left = self._ask(generation, pairs, accepted=not waiting)
        elif left and (still := self._ask(generation, pairs, accepted=not waiting)) is not None:
            left = {client: still[client] for client in left if client in still}
        # Of UNIX sockets those that wait are not told: so ask again when they have been accepted.
        its.unread = None if waiting else left
        its.waited_s += its.delay_s
        its.quiet_s += its.delay_s if its.quiet_looks else 0.0
        its.quiet_looks += 1
        if waiting or still_come or left is None or not all(left.values()):
            its.quiet_looks, its.quiet_s = 0, 0.0
        if its.reads_on:
            quiet = its.quiet_looks >= _SOON_LOOKS
        else:
            quiet = its.quiet_s > QUIET_S - _LOOK_S / 2
        awaited = left and its.waited_s < SILENT_S - _LOOK_S / 2
        late = now - its.began >= LAST_S
        if late or (quiet and not awaited):
            if waiting:
                hint = "its workers do not accept; the next generation gets what waits"
                self._log.write("warning", "not-taken", generation=generation, hint=hint)
            del self._generations[generation]
            its.over()
            return
        asking_s = time.monotonic() - now
        look_s = _LOOK_SOON_S if its.reads_on else _LOOK_S
        its.delay_s = max(look_s, asking_s / ASKING_SHARE)
        again = partial(self._look, generation)
        self._loop.call_after(("quiesce", generation), its.delay_s, again)

    def _ask(
        self, generation: int, pairs: Sequence[Listener], *, accepted: bool
    ) -> dict[tuple[int, bytes], bool] | None:
        """Return the clients at these addresses that were not read from, and whether each is
        silent; none where the kernel does not tell.

        accepted: without those in a backlog.  Of one that reads on, those about to connect.

        None where it could not be asked just now.
        """
        its, found = self._generations[generation], dict[tuple[int, bytes], bool]()
        for family in {each.socket.family for each in pairs}:
            mine = [each for each in pairs if each.socket.family == family]
            if family == socket.AF_UNIX:
                replaced = [each for each in mine if self._is_replaced(each, generation)]
                try:
                    found.update(_unread_unix(mine, its.socket_number, replaced))
                except OSError as error:
                    if error.errno in SCARCE:
                        return None
                continue
            ports = {each.port for each in mine}
            known: dict[int, dict[bytes, bool]]
            try:
                if its.reads_on:
                    shaking = handshakes_by_port(family, ports)
                    known = {port: dict.fromkeys(each, False) for port, each in shaking.items()}
                else:
                    known = unread_by_port(family, ports, accepted=accepted)
            except OSError as error:
                if error.errno in SCARCE:
                    return None
                continue  # sock_diag is not there: QUIET_S is far longer than most take
            for each in mine:
                clients = known[each.port].items()
                found.update(((each.index, client), silent) for client, silent in clients)
        return found
