"""Counts each generation's open connections from the kernel's data, under --handoff listener.

`status` shows the counts.  Each listening socket of a generation has a number, the accept tag,
which the socket's connections inherit (system/accept_tags.py).  At a UNIX path, the tag is the key
of the socket's file (system/sock_diag.py).  Connections without a tag (NO_TAG) count for no
generation.

We query the kernel so seldom that the queries take at most QUERY_SHARE (accept_watch.py) of our
time.  Until the next query, `status` shows the last counts.
"""

from __future__ import annotations

import errno
import socket
import time
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress

from ....model.lazy_dataclass import field, mutable
from ....system import accept_tags, sock_diag
from ....system.listener import Listener
from .accept_watch import QUERY_SHARE
from .shared_listeners import SharedListeners

#: A socket gets this tag if we find no unused tag, or if connections in the socket's backlog may
#: carry a tag that the socket had before.
NO_TAG = 0
_OTHERS_WAIT = "clients with the tag of another generation wait at the socket"


@mutable
class OpenCounts:
    """The open connections of all generations, counted by one query of each listener."""

    listeners: SharedListeners
    #: Index of a listener -> how many connections carry each tag.  A listener is missing if it
    #: has one socket, or if the kernel did not answer.
    _found: dict[int, Counter[int]] = field(default_factory=dict)
    #: Index of a TCP listener -> tags that no connection carries: the last query of _unused_tag()
    #: found no connection with such a tag, and we have since given the tag to no socket.  So most
    #: reloads need no query.  A query takes 4 ms or more if the kernel's table of connections has
    #: 260,000 places.
    _unused: dict[int, set[int]] = field(default_factory=dict)
    _next_query_at: float = 0.0

    def tag_sockets(
        self, socket_number: int, taken: Collection[tuple[int, int]]
    ) -> tuple[tuple[int, int], ...]:
        """Tag the sockets of a generation that will start; return pairs of listener index and tag.

        socket_number: the number, 0 or 1, of the generation's socket at each listener.  taken: the
        pairs of other generations.  The result is empty if the kernel's data cannot tell this
        generation's connections from another generation's.
        """
        try:
            return tuple(self._tag(each, socket_number, taken) for each in self.listeners.living)
        except OSError:
            return ()

    def _tag(
        self, listener: Listener, socket_number: int, taken: Collection[tuple[int, int]]
    ) -> tuple[int, int]:
        """Tag one socket; return its listener's index, and the tag of connections accepted there.

        Raises OSError if these connections may carry the tag of another generation.
        """
        if not listener.has_sibling:
            raise OSError(errno.EOPNOTSUPP, "all generations accept from one socket")
        listening = listener.socket_for(socket_number)
        if listening.family == socket.AF_UNIX:
            tag = sock_diag.file_key(listening)
            # `taken` lacks the tags of released generations, and tags that were deleted from the
            # records (by SharedListeners.note_bound() or SharedDelivery._stop_counting()).  Open
            # connections may still carry such a tag.  So also look for open connections with this
            # socket's tag.
            if (listener.index, tag) in taken or _by_tag(listener, None)[tag]:
                raise OSError(errno.EBUSY, "another generation has accepted from the socket")
            return listener.index, tag
        used = {tag for index, tag in taken if index == listener.index} - {NO_TAG}
        if accept_tags.tag_of(listening) in used and listener.has_waiting(socket_number):
            # The socket has another generation's tag, and clients in the backlog may carry it.  So
            # do not count this generation's connections.  Leave the tag as it is: if we are killed,
            # the next program repeats this check, finds the same tag, and does not count either.
            raise OSError(errno.EBUSY, _OTHERS_WAIT)
        tag = NO_TAG
        with suppress(OSError):  # for example no descriptor is free, or the kernel does not answer
            tag = self._unused_tag(listener, socket_number, used)
        # Removed first: if setting the tag fails, we do not know which tags the socket has had.
        unused = self._unused.pop(listener.index, set())
        earlier = accept_tags.tag(listening, tag, used)
        if earlier and listener.has_waiting(socket_number):
            # Connections in the backlog may carry one of this socket's earlier tags.  A count by
            # the new tag would miss these connections, so use NO_TAG.  If one of the earlier tags
            # now belongs to another generation, that generation's count would include these
            # connections.  So raise OSError: tag_sockets() then returns no tags, and
            # SharedDelivery.open() forgets the other generations' tags (_stop_counting()).
            earlier |= accept_tags.tag(listening, NO_TAG, used)
            if not earlier.isdisjoint(used):
                raise OSError(errno.EBUSY, _OTHERS_WAIT)
            tag = NO_TAG
        self._unused[listener.index] = unused - {tag, *earlier}
        return listener.index, tag

    def _unused_tag(self, listener: Listener, socket_number: int, used: Collection[int]) -> int:
        """Return a tag that no accepted connection carries; NO_TAG: no tag is left.

        After a query, prefer the socket's present tag, because clients in its backlog may carry
        this tag.

        used: the tags of other generations.  Raises OSError.
        """
        listening, other = (listener.socket_for(n) for n in (socket_number, 1 - socket_number))
        tag, other_tag = accept_tags.tag_of(listening), accept_tags.tag_of(other)
        # If the tag of a replaced socket could not be copied (tcp_listener.py), the new socket has
        # a tag that may be in `_unused`.
        unused = self._unused.get(listener.index, set()).difference(used, {tag, other_tag})
        if unused and not listener.has_waiting(socket_number):
            # Each changed bit gives the socket one more tag for a moment, so change few bits.
            return min(unused, key=lambda each: ((each ^ tag).bit_count(), each))
        # Avoid the tags of open connections, too.  A connection may outlive its generation's
        # workers: another process, such as a worker's child, may have the connection.
        ours = self.listeners.host.own_connection
        found, waiting = accept_tags.connections(listening, ours)
        self._found[listener.index] = found
        all_used = {*used, *found, *waiting, other_tag}
        unused = self._unused[listener.index] = set(range(1, accept_tags.TAGS + 1)) - all_used
        if tag != NO_TAG and tag not in {*used, *found}:
            return tag
        return min(unused, default=NO_TAG)

    def active(self, tags: Collection[tuple[int, int]]) -> int | None:
        """Return how many open connections carry these tags; None: unknown.

        tags: a generation's pairs of listener index and tag; empty: the tags are unknown.
        """
        if tags and time.monotonic() >= self._next_query_at:
            self._query()
        if not tags or any(tag == NO_TAG or index not in self._found for index, tag in tags):
            return None
        return sum(self._found[index][tag] for index, tag in tags)

    def _query(self) -> None:
        """Count the open connections of the listeners with two sockets."""
        began = time.monotonic()
        self._found.clear()
        ours = self.listeners.host.own_connection  # over TCP, leave out our health probe
        for each in self.listeners.pairs:
            with suppress(OSError):
                self._found[each.index] = _by_tag(each, ours)
        ended = time.monotonic()
        self._next_query_at = ended + (ended - began) / QUERY_SHARE


def has_open(
    listeners: SharedListeners, sockets: Iterable[tuple[Listener, int]], index: int
) -> bool:
    """Return whether a connection accepted at one of these sockets of a listener is still open.

    Also return False if the socket has no tag, or if the kernel does not answer.
    """
    ours = listeners.host.own_connection
    for each, number in sockets:
        if each.index == index:
            listening = each.socket_for(number)
            with suppress(OSError):
                tag = (sock_diag.file_key if each.path else accept_tags.tag_of)(listening)
                return tag != NO_TAG and _by_tag(each, ours)[tag] > 0
    return False


def _by_tag(listener: Listener, ours: socket.socket | None) -> Counter[int]:
    """Return how many open connections of a listener carry each tag.  Raises OSError.

    ours: our own TCP connection, which is not counted.
    """
    if listener.path:
        return Counter(file for file, _, _ in sock_diag.accepted_unix())
    return accept_tags.connections(listener.socket, ours)[0]
