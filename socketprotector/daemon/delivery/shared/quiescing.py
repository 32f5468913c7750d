"""Finds out when an old generation has accepted all its clients, and has read from each client.

Another generation has replaced the old generation, or a stop has begun.  The old generation may
have clients that are not accepted, or not read from ("unread").  If we ordered its workers to
finish now, the workers might close the connections of such clients.

So we wait, and repeatedly query the kernel (sock_diag) for such clients.  Each round of queries is
a look.  The queries take at most QUERY_SHARE (accept_watch.py) of our time.  If the kernel has no
sock_diag, no client counts as unread.

A TCP client is unread until its worker has read from it.  So clients in the handshake are unread.
Silent clients are unread, too: they were accepted, but have sent nothing.  We wait at most SILENT_S
for silent clients.  A UNIX client is unread while it has sent bytes that its worker has not read.

Workers on the client library read from all their accepted clients even after the order to finish.
For a generation of such workers (`reads_on`) we do not wait until the workers have read.  We wait
only until all clients are accepted, including clients in the handshake.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from ....model.lazy_dataclass import mutable
from ....system.listener import RESOURCE_ERRNOS, Listener
from ....system.sock_diag import accepted_unix, file_key, still_unread, unread
from .accept_watch import QUERY_SHARE
from .probes import Probes
from .shared_listeners import SharedListeners, Steering
from .turns import Turns

#: The pause between two looks.
_LOOK_S = 0.1
#: The pause with `reads_on`.
_LOOK_SOON_S = 0.01
#: With `reads_on`: how many looks in a row must find that all clients are accepted.
_SOON_LOOKS = 2
#: Without `reads_on`: a generation is quiet when, for this long, each look has found that no client
#: waits, and that all unread clients are silent.  A client in a TLS handshake, or with half a
#: request, is not unread: its worker has read something.  With 0.5 s, reloads cut off such clients.
GENERATION_QUIET_S = 1.0
#: How long to wait for silent clients.
SILENT_S = 3.0
#: After this time we stop waiting for a generation, even if clients are unaccepted or unread.
GENERATION_LAST_S = 10.0


@mutable
class _Generation:
    """One generation that gets no new clients, and its unread clients."""

    socket_number: int
    on_quiet: Callable[[], None]
    common: Sequence[Listener]  # listeners with one socket, at which clients wait
    leave_out: Collection[int]  # indices of listeners whose clients we do not wait for
    reads_on: bool  # whether its workers read from all accepted clients before they exit
    # Until this time, looks that find waiting clients restart the limit GENERATION_LAST_S (see
    # begin()).
    accept_until: float
    began: float  # when we began to wait (time.monotonic())
    delay_s: float = 0.0  # the planned pause before the next look
    # Sums of planned pauses, not elapsed times.  While the protector and its workers are frozen,
    # time elapses, but no worker can read.
    waited_s: float = 0.0  # since `began`
    quiet_s: float = 0.0  # since the first of the `quiet_looks` looks
    quiet_looks: int = 0  # looks in a row that found no client, or only silent clients
    # The clients that the first look and all later looks have found unread (with `reads_on`: in
    # the handshake) -> whether the client is silent.  The key: the listener's index, and the
    # connection: for TCP as in sock_diag.unread(), for UNIX the inode.  None: the next look counts
    # as the first.
    unread: dict[tuple[int, bytes], bool] | None = None


def _unread_tcp(
    family: int, listeners: Sequence[Listener], state: _Generation
) -> dict[tuple[int, bytes], bool]:
    """Return the unread clients of a generation's TCP sockets.  Raises OSError.

    sock_diag reports by port: it cannot tell apart the backlogs of an address's two sockets.  No
    client waits for this generation (see Quiescing._look()), so all clients in both backlogs are
    the other generation's.  unread() leaves them out.
    """
    if state.unread is None:
        by_port = unread(family, {each.port for each in listeners}, in_handshake=state.reads_on)
        return {
            (each.index, client): silent
            for each in listeners
            for client, silent in by_port[each.port].items()
        }
    indices = {each.index for each in listeners}
    known = [key for key in state.unread if key[0] in indices]
    still = still_unread(family, {client for _, client in known}, in_handshake=state.reads_on)
    return {key: still[key[1]] for key in known if key[1] in still}


def _unread_unix(
    listeners: Sequence[Listener], state: _Generation, tags: Iterable[tuple[int, int]]
) -> dict[tuple[int, bytes], bool]:
    """Return the unread clients of a generation's UNIX sockets.  Raises OSError.

    The kernel reports 0 unread bytes for a silent client, as for a client whose bytes were read.
    So we wait for neither.

    tags: the generation's (open_counts.py).  They name the file of a socket that was replaced after
    the generation's start, too.
    """
    by_file = {file_key(each.socket_for(state.socket_number)): each.index for each in listeners}
    by_file.update((tag, index) for index, tag in tags if index in by_file.values())
    found: dict[tuple[int, bytes], bool] = {}
    for file, inode, unread_bytes in accepted_unix():
        index = by_file.get(file)
        if unread_bytes and index is not None:
            client = index, b"%d" % inode
            if state.unread is None or client in state.unread:
                found[client] = False
    return found


class Quiescing:
    """The generations that have not gone quiet yet."""

    def __init__(
        self, listeners: SharedListeners, turns: Turns, probes: Probes, steering: Steering
    ) -> None:
        self._listeners, self._turns = listeners, turns
        self._probes, self._steering = probes, steering
        runtime = listeners.host.runtime
        self._loop, self._log = runtime.loop, runtime.log
        self._generations: dict[int, _Generation] = {}

    def begin(
        self,
        generation: int,
        socket_number: int,
        on_quiet: Callable[[], None],
        *,
        common: Sequence[Listener] = (),
        leave_out: Collection[int] = (),
        reads_on: bool = False,
        accept_until: float = 0.0,
    ) -> None:
        """Call back when a generation has accepted and read from all its clients.

        Once new clients can no longer come, the wait lasts at most GENERATION_LAST_S, unless
        `accept_until` prolongs the wait.  If this limit ends the wait, clients may still be
        unaccepted or unread.

        socket_number: the generation's socket.
        common: listeners with one socket for all generations.  Clients waiting there must be
        accepted, too.
        leave_out: indices of listeners whose clients we do not wait for.
        reads_on: call back once all clients are accepted, without waiting for the reading.
        accept_until: until this time, each look that finds clients waiting at the generation's own
        sockets restarts the limit GENERATION_LAST_S.  The reason: no other generation would accept
        these clients.  Exception: clients that wait at a listener whose new clients can come to the
        wrong socket (SharedListeners.can_stray()) do not restart the limit.
        """
        given = socket_number, on_quiet, common, leave_out, reads_on, accept_until
        self._generations[generation] = _Generation(*given, began=time.monotonic())
        self._look(generation)

    def end(self, generation: int) -> None:
        """Stop waiting for a generation that was ordered to finish."""
        if self._generations.pop(generation, None) is not None:
            self._loop.cancel(("quiesce", generation))

    @property
    def generations(self) -> tuple[int, ...]:
        """The generations that we wait for."""
        return tuple(self._generations)

    def begin_again(self, generation: int) -> None:
        """Start the waiting times of a generation again."""
        state = self._generations[generation]
        state.began, state.waited_s, state.unread = time.monotonic(), 0.0, None
        state.quiet_looks, state.quiet_s = 0, 0.0

    def _look(self, generation: int) -> None:
        state, now = self._generations[generation], time.monotonic()
        # Ask the steering before the queries.  If the steering says that no new client comes, the
        # last client came before the queries, so the queries can find this client.
        gets_clients = not self._steering.gets_no_client(generation)
        state.common = [each for each in state.common if each.has_waiting()]
        listeners = self._listeners.awaited(generation, state.leave_out)
        own = self._turns.not_given_back(listeners, state.socket_number, generation)
        # Unlike `own`, `queried` includes listeners whose socket was replaced since the generation
        # started: clients from the earlier socket may be unread.
        queried = self._turns.not_given_back(listeners, state.socket_number)
        number, can_stray = state.socket_number, self._listeners.can_stray
        with_waiting = [each for each in own if self._probes.clients_wait(each, number)]
        waiting = bool(with_waiting or state.common)
        must_accept = now < state.accept_until and not all(map(can_stray, with_waiting))
        if gets_clients or must_accept:
            self.begin_again(generation)
        if waiting:
            # Do not query: while clients wait, the generation is not quiet.  Once they are
            # accepted, they may be unread.  Later looks only remove clients from `unread`, so the
            # next look counts as the first.
            state.unread = None
        elif state.unread != {} and (found := self._query(generation, queried)) is not None:
            state.unread = found
        state.waited_s += state.delay_s
        state.quiet_s += state.delay_s if state.quiet_looks else 0.0
        state.quiet_looks += 1
        if waiting or gets_clients or state.unread is None or not all(state.unread.values()):
            state.quiet_looks, state.quiet_s = 0, 0.0
        if state.reads_on:
            quiet = state.quiet_looks >= _SOON_LOOKS
        else:
            quiet = state.quiet_s > GENERATION_QUIET_S - _LOOK_S / 2
        awaits_silent = state.unread and state.waited_s < SILENT_S - _LOOK_S / 2
        late = now - state.began >= GENERATION_LAST_S
        if late or (quiet and not awaits_silent):
            if waiting:
                hint = "workers have not accepted some clients; a reload gives these clients to "
                hint += "another generation; a stop disconnects them, unless systemd or another "
                hint += "owner keeps the socket open"
                self._log.write("warning", "not-accepted", generation=generation, hint=hint)
            del self._generations[generation]
            state.on_quiet()
            return
        query_s = time.monotonic() - now
        look_s = _LOOK_SOON_S if state.reads_on else _LOOK_S
        state.delay_s = max(look_s, query_s / QUERY_SHARE)
        again = partial(self._look, generation)
        self._loop.call_after(("quiesce", generation), state.delay_s, again)

    def _query(
        self, generation: int, listeners: Sequence[Listener]
    ) -> dict[tuple[int, bytes], bool] | None:
        """Return the unread clients of these listeners, and whether each is silent.

        After the first look, return only clients that all looks have found.  For a generation with
        `reads_on`, return instead the clients whose handshake is under way.  None: the system is
        short of memory or descriptors, so try again.  If a query has failed for another reason,
        leave out the clients of its address family.
        """
        state, found = self._generations[generation], dict[tuple[int, bytes], bool]()
        for family in {each.socket.family for each in listeners}:
            of_family = [each for each in listeners if each.socket.family == family]
            try:
                if family != socket.AF_UNIX:
                    found.update(_unread_tcp(family, of_family, state))
                elif not state.reads_on:  # a UNIX connection has no handshake
                    opened = self._listeners.host.generations.get(generation)
                    tags = opened.record.accept_tags if opened is not None else ()
                    found.update(_unread_unix(of_family, state, tags))
            except OSError as error:
                if error.errno in RESOURCE_ERRNOS:
                    return None
                # No sock_diag: no client counts as unread.  Without `reads_on`, most workers have
                # read from all their clients when GENERATION_QUIET_S has passed.
        return found
