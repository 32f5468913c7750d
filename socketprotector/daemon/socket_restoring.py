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
if TYPE_CHECKING:  # only where workers accept: its table of options costs memory
    from ..system.socket_snapshot import Snapshot

#: Stands for no generation: the socket as it was made.
_MADE = 0


class SocketRestoring:
    """Owns what the sockets of each listener were like, by generation and listener."""

    def __init__(self, runtime: Runtime, listeners: Callable[[], Sequence[Listener]]) -> None:
        self._log = runtime.log
        self._listeners = listeners
        self._before: dict[tuple[int, int], Snapshot] = {}

    @property
    def record(self) -> tuple[tuple[int, int, str], ...]:
        """What the next program has to know: generation, listener, snapshot."""
        if not self._before:
            return ()
        from ..system.socket_snapshot import as_text

        return tuple((*key, as_text(each)) for key, each in self._before.items())

    @record.setter
    def record(self, found: Sequence[tuple[int, int, str]]) -> None:
        self._before = {}
        if not found and not any(each.shared for each in self._listeners()):
            return
        # Here, because the file may have changed when the next generation begins.
        from ..system.socket_snapshot import from_text

        for of, index, text in found:
            self._before[of, index] = from_text(text)

    def begin(
        self, generation: int, listener: Listener, socket_number: int, *, alone: bool
    ) -> list[str]:
        """Make a socket ready for a generation; return the options that cannot be restored.

        alone: no other generation accepts from it.
        """
        from ..system.socket_snapshot import raise_backlog, restore, take

        one = listener.socket_for(socket_number)
        made = self._before.get((_MADE, listener.index))
        if not alone:
            self._before[generation, listener.index] = take(one)
            if made is not None:
                raise_backlog(one, made)
            return []
        if made is not None:
            return restore(one, made)
        self._before[_MADE, listener.index] = take(one)
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
        if not mine:
            return
        from ..system.socket_snapshot import restore

        if others and max(others) < generation:
            by_index = {each.index: each for each in self._listeners() if not each.lost}
            for key in mine:
                if key[1] in by_index:
                    listener = by_index[key[1]]
                    stays = restore(listener.socket_for(socket_number), self._before[key])
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
            from ..system.socket_snapshot import raise_backlog

            for one in listener.sockets:
                raise_backlog(one, made)

    def warn(self, listener: Listener, names: Sequence[str]) -> None:
        """Log the options that cannot be restored."""
        if names:
            address = listener.settings.address
            self._log.write("warning", "not-restored", listen=address, options=" ".join(names))
