"""Takes back what a generation has done to the listening sockets that another one uses.

Workers share their listening sockets.  A release that fails may have called listen(5), or set
TCP_DEFER_ACCEPT, and that stays after it.  So the options (system/socket_snapshot.py) are restored

* before a generation begins on a socket that no other one uses: as the socket was when it was made;
* when a generation ends before an older one on the same socket, which is how a release fails: as
  the socket was when it began.  What the serving generation has set before stays.

But a backlog that the serving generation has lowered is raised again when the next one begins on
the same socket, or when no generation accepts: more clients that wait harm neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ..system.listener import Listener
from .runtime import Runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

    from ..system.socket_snapshot import Snapshot

#: Stands for no generation: the socket as it was made.
_MADE = 0


def _snapshots() -> ModuleType:
    """Return the module, which is loaded only where workers accept: its table costs memory."""
    from ..system import socket_snapshot

    return socket_snapshot


class SocketRestoring:
    """Owns what the sockets of each listener were like, by generation and listener."""

    def __init__(self, runtime: Runtime, listeners: Callable[[], Sequence[Listener]]) -> None:
        self._log = runtime.log
        self._listeners = listeners
        self._before: dict[tuple[int, int], Snapshot] = {}

    @property
    def record(self) -> tuple[tuple[int, int, str], ...]:
        """What the next program has to know: generation, listener, snapshot."""
        return tuple((*key, _snapshots().as_text(each)) for key, each in self._before.items())

    @record.setter
    def record(self, found: Sequence[tuple[int, int, str]]) -> None:
        if any(each.shared for each in self._listeners()):
            _snapshots()  # now: when the next generation begins its file may have changed
        self._before = {(of, index): _snapshots().from_text(text) for of, index, text in found}

    def begin(
        self, generation: int, listener: Listener, socket_number: int, *, alone: bool
    ) -> list[str]:
        """Make a socket ready for a generation; return the options that cannot be restored.

        alone: no other generation accepts from it.
        """
        snapshots = _snapshots()
        one = listener.socket_for(socket_number)
        made = self._before.get((_MADE, listener.index))
        if not alone:
            self._before[generation, listener.index] = snapshots.take(one)
            if made is not None:
                snapshots.raise_backlog(one, made)
            return []
        if made is not None:
            stays: list[str] = snapshots.restore(one, made)
            return stays
        self._before[_MADE, listener.index] = snapshots.take(one)
        return []

    def end(
        self, generation: int, socket_number: int, others: Collection[int], *, gone: bool
    ) -> None:
        """Restore what a generation has changed, if the others are all older: then it has failed.

        gone: it has no workers any more, which could change more.
        """
        if not others:
            self._let_all_wait()
        mine = [key for key in self._before if key[0] == generation]
        if others and max(others) < generation:
            by_index = {each.index: each for each in self._listeners() if not each.lost}
            for key in mine:
                if key[1] in by_index:
                    listener = by_index[key[1]]
                    one = listener.socket_for(socket_number)
                    stays = _snapshots().restore(one, self._before[key])
                    self.warn(listener, stays)
        else:
            gone = True
        for key in mine if gone else ():
            del self._before[key]

    def _let_all_wait(self) -> None:
        """Raise each backlog: clients wait for the next generation, which may start much later."""
        for listener in self._listeners():
            made = self._before.get((_MADE, listener.index))
            if made is None or listener.lost:
                continue
            for one in listener.sockets:
                _snapshots().raise_backlog(one, made)

    def warn(self, listener: Listener, names: Sequence[str]) -> None:
        """Log the options that cannot be restored."""
        if names:
            address = listener.settings.address
            self._log.write("warning", "not-restored", listen=address, options=" ".join(names))
