"""Undoes a generation's changes to the options of a socket that other generations also use.

Generations may share a listening socket.  A release that fails may have shortened the backlog by
listen(), or set TCP_DEFER_ACCEPT.  Such changes remain after the release's workers have exited.  So
we restore the options (system/socket_snapshot.py) in two cases:

* Before a generation accepts from a socket that no other generation uses, we restore the initial
  options, which the listener had before its first generation.
* If a release has shared the socket with another generation and fails, we restore the options that
  the socket had when the release started.  So earlier changes by the serving generation remain.  A
  release has failed if its generation ends and only older generations still accept.

If an option cannot be restored, we replace the socket.  Exception: if all generations share the
socket, we replace it only if the option keeps clients out, and only if the socket can be dropped
without a loss (Listener.can_do_without()).  We log an option that stays changed.

We let the serving generation shorten a backlog while it accepts alone.  When another generation
starts to accept from the socket, or when no generation accepts, we raise the backlog to its initial
length.  If a backlog is longer than its initial length, we change the backlog only in the two cases
listed above.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ....system import socket_snapshot
from ....system.listener import Listener
from ....system.socket_snapshot import Snapshot
from .shared_listeners import SharedListeners, Steering

#: The generation number under which we keep a listener's initial options.
_INITIAL = 0


class SocketOptionRestore:
    """The earlier options of the listening sockets, by generation and listener."""

    def __init__(self, listeners: SharedListeners, steering: Steering) -> None:
        self._log = listeners.host.runtime.log
        self._listeners = listeners
        self._steering = steering
        self._before: dict[tuple[int, int], Snapshot] = {}

    @property
    def record(self) -> tuple[tuple[int, int, str], ...]:
        """Each snapshot, with its generation and listener, for the program that replaces us."""
        return tuple((*key, socket_snapshot.as_text(each)) for key, each in self._before.items())

    @record.setter
    def record(self, found: Sequence[tuple[int, int, str]]) -> None:
        self._before = {
            (generation, index): socket_snapshot.from_text(text)
            for generation, index, text in found
        }

    def begin(
        self, generation: int, listener: Listener, socket_number: int, is_alone: Callable[[], bool]
    ) -> None:
        """Prepare a socket's options before a generation accepts from the socket.

        If another generation accepts from the socket, record the present options, for end().
        Otherwise restore the initial options.  If no initial options are recorded yet, record the
        present options as the initial options.

        is_alone: returns whether no other generation accepts from the socket.
        """
        initial = self._before.get((_INITIAL, listener.index))
        if initial is not None and is_alone():
            self._restore(listener, socket_number, initial)
        listening = listener.socket_for(socket_number)
        # Check again: if _restore() dropped this socket, the generation shares the other socket.
        if not is_alone():
            self._before[generation, listener.index] = socket_snapshot.take(listening)
            if initial is not None:
                socket_snapshot.raise_backlog(listening, initial)
        elif initial is None:
            self._before[_INITIAL, listener.index] = socket_snapshot.take(listening)

    def end(
        self, generation: int, socket_number: int, remaining: Collection[int], *, gone: bool
    ) -> None:
        """Undo the changes of an ended generation if it is a failed release.

        See the module docstring.  If no generation accepts any more, also raise short backlogs to
        their initial length.

        remaining: the generations that still accept.  gone: whether all workers of the ended
        generation have exited, and so cannot change an option any more.
        """
        if not remaining:
            self._raise_backlogs()
        own_keys = [key for key in self._before if key[0] == generation]
        has_failed = bool(remaining) and max(remaining) < generation
        if has_failed:
            by_index = {each.index: each for each in self._listeners.living}
            for key in own_keys:
                if key[1] in by_index:
                    listener = by_index[key[1]]
                    if not listener.has_sibling:
                        listener.let_in()
                    self._restore(listener, socket_number, self._before[key], may_log=gone)
        if gone or not has_failed:
            for key in own_keys:
                del self._before[key]

    def _raise_backlogs(self) -> None:
        """Raise each backlog to its initial length, because no generation accepts now."""
        for listener in self._listeners.living:
            initial = self._before.get((_INITIAL, listener.index))
            if initial is None:
                continue
            for listening in listener.sockets:
                socket_snapshot.raise_backlog(listening, initial)

    def _restore(
        self, listener: Listener, socket_number: int, before: Snapshot, *, may_log: bool = True
    ) -> None:
        """Restore a socket's options; if that fails, replace the socket where this is allowed.

        may_log: whether to log the options that stay changed.
        """
        listening, count = listener.socket_for(socket_number), len(listener.sockets)
        unrestored = socket_snapshot.restore(listening, before)
        # Running workers do not get the new socket.  If all generations share the socket, no worker
        # accepts from the replacement until a new generation starts.  So replace such a socket
        # only if it keeps clients out.
        if unrestored and (
            listener.has_sibling
            or (
                socket_snapshot.KEEPS_CLIENTS_OUT.intersection(unrestored)
                and listener.can_do_without(listening)
            )
        ):
            self._steering.replace(listener, socket_number)
            if listener.lost or len(listener.sockets) != count:
                return  # no socket remains, or only the socket of the serving generation
            unrestored = socket_snapshot.restore(listener.socket_for(socket_number), before)
        if unrestored and may_log:
            address, options = listener.settings.address, " ".join(unrestored)
            hint = "restart SocketProtector to get another socket"
            self._log.write("warning", "not-restored", listen=address, options=options, hint=hint)
