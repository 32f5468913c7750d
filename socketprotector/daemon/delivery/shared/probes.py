"""Brings probes to a generation, and distinguishes waiting probes from waiting clients.

At a TCP address each probe has a mark: special values in the IP header (system/bpf.py).  The kernel
recognizes the mark, and steers the probe to the socket of one generation.  Exception: if a probe
must connect as clients do, the kernel steers the probe like a client, whatever the mark.  If a
generation has its own socket at a UNIX path, a probe connects to this socket's file.

If no worker accepts from a socket, we discard the probes that wait there.  If we kept them,
socket_watch.py would take them for clients, and start a generation.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from ....system import bpf, reuseport, socket_copy, socket_snapshot
from ....system.cleanup import on_error
from ....system.listener import RESOURCE_ERRNOS, TRANSIENT_ERRNOS, Listener
from ....system.sock_diag import end_of, is_waiting, unaccepted, why_unreachable
from ..probe_target import ProbeTarget
from .shared_listeners import SharedListeners, Steering
from .turns import Turns

#: How long workers may still accept after they were ordered to finish.  gunicorn's threads, for
#: example, check for this order once a second.
LATE_ACCEPT_S = 2.0
#: The errors after which another try may succeed.
RETRY_ERRNOS = RESOURCE_ERRNOS | {errno.EBUSY}


def _waits(listening: socket.socket, address: tuple[str, int], client: socket.socket) -> bool:
    """Return whether our connection waits to be accepted.  Raises OSError.

    Over TCP without sock_diag, returns True while any connection waits.
    """
    if not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        # The socket was shut down, so our connection may be at the address's other socket.
        raise OSError(errno.ENOTCONN, "the listening socket was shut down")
    if listening.family == socket.AF_UNIX:
        return os.fstat(client.fileno()).st_ino in unaccepted(listening)
    try:
        return is_waiting(client, address, socket_copy.device_of(listening))
    except OSError:  # the kernel has no sock_diag
        return _has_waiting(listening)


def _waits_elsewhere(client: socket.socket) -> bool:
    """Raise OSError: another program has our connection.  Takes the place of _waits()."""
    raise OSError(errno.ENOTCONN, "another program's socket is at our path")


def _end_of(client: socket.socket, listening: socket.socket) -> bytes | int:
    """Return how unaccepted() lists our connection: its port and address, or its inode."""
    if listening.family == socket.AF_UNIX:
        return os.fstat(client.fileno()).st_ino
    return end_of(client, listening.family)


def _has_waiting(listening: socket.socket) -> bool:
    return reuseport.queue(listening)[0] > 0


class Probes:
    """The probes of all generations, and the sockets at which probes may wait."""

    def __init__(self, listeners: SharedListeners, turns: Turns, steering: Steering) -> None:
        self._listeners, self._turns, self._steering = listeners, turns, steering
        self._persist = listeners.host.runtime.persist
        #: Sockets (listener index, socket number) that get probes and no clients.  At such a UNIX
        #: socket, all waiting connections are probes.  At such an IPv6 socket, all waiting
        #: connections from the probes' source address are probes.
        self.probed: set[tuple[int, int]] = set()
        #: Sockets that get IPv4 probes: listener index, socket number, and the source address of
        #: the probes.  No client has this address.
        self.probe_sources: set[tuple[int, int, str]] = set()
        #: The mark of probes that connect as clients do, by listener index and socket number.
        self._marks: dict[tuple[int, int], bpf.Mark] = {}
        #: Probe mark -> the number of the socket to which connections with this mark go.
        self.socket_by_mark: dict[bpf.Mark, int] = {}
        #: The serving generation's abandoned probes: we closed them before a worker accepted them.
        #: Each entry has the listening socket, and the probe's _end_of().
        self._abandoned: list[tuple[socket.socket, bytes | int]] = []

    def reach_as_client(
        self, name: str, knows: Callable[[int], bool] = lambda index: True
    ) -> ProbeTarget | None:
        """Return the target for probes that reach the serving generation as clients do.

        None: no such listener.  name: the name of the listener; "": the first listener.  knows:
        returns whether the serving generation knows a listener, by index.  Raises OSError, also if
        our connections cannot reach the listener.
        """
        each = self._first(self._listeners.living, name, knows)
        if each is None:
            return None
        listening = each.socket_for(self._turns.current)
        unix = listening.family == socket.AF_UNIX
        address = each.ensure_address(self._turns.current)
        if why := why_unreachable(listening, address[0]):
            raise OSError(errno.EADDRNOTAVAIL, why)
        waits: Callable[[socket.socket], bool] = partial(_waits, listening, address)
        if each.path_fault:  # connect to the path, as clients do, not to the socket's own file
            address, waits = each.local_address, _waits_elsewhere
        # The mark's source address keeps the probe on this machine, as in reach_by_mark().
        mark = None if unix else self._mark_for(each, address)
        target = ProbeTarget(address, mark, waits, lambda: None)
        # If the listener has two sockets, note each abandoned probe, so that discard() can discard
        # the probe.  If there is only one socket, the next generation accepts the probe.
        if each.has_sibling:
            target.abandon = partial(self._note_abandoned, listening)
        return target

    def _mark_for(self, listener: Listener, address: tuple[str, int]) -> bpf.Mark:
        place = listener.index, self._turns.current
        if place not in self._marks:
            mark = self._marks[place] = bpf.Mark.draw(address[0])
            self._record_source(place, mark)
        return self._marks[place]

    def _record_source(
        self, place: tuple[int, int], mark: bpf.Mark | None, *, no_clients: bool = False
    ) -> None:
        """Record how to recognize a socket's probes.

        waiting_at() uses this record.  So does the next program, after an upgrade or a kill.

        IPv4 probes have a source address that no client has: record this address.  IPv6 probes may
        have the same address as this machine's clients, and UNIX probes have no address.  So for
        both kinds record the socket, but only if the socket gets no clients (`no_clients`).
        """
        if mark is not None and mark.family == socket.AF_INET:
            self.probe_sources.add((*place, mark.source))
        elif no_clients and place not in self.probed:
            self.probed.add(place)
        else:
            return
        self._persist()  # before the first probe, because a kill may follow

    def _note_abandoned(self, listening: socket.socket, client: socket.socket) -> None:
        self._abandoned.append((listening, _end_of(client, listening)))

    def reach_by_mark(
        self, generation: int, name: str, knows: Callable[[int], bool] = lambda index: True
    ) -> ProbeTarget | None:
        """Return the target for probes that reach a generation by a mark, or by its socket's file.

        None: the generation does not accept, or knows no matching listener with two sockets.
        name: the name of the listener; "": the first listener that has two sockets.  knows: returns
        whether the generation knows a listener, by index.

        The generation may be the serving generation, too.  A hold does not stop these probes.  They
        never leave this machine, even if the address belongs to another machine.  Raises OSError,
        for example EAGAIN while workers of an earlier generation may answer.
        """
        socket_number = self._turns.accepting.get(generation)
        if socket_number is None:
            return None
        found = self._listener_to_probe(name, knows)
        if found is None:
            return None
        for left_number, ordered_at in self._turns.leaving.values():
            if found.is_fresh[socket_number]:
                break  # old workers do not have this socket
            if left_number == socket_number and time.monotonic() < ordered_at + LATE_ACCEPT_S:
                why = "old workers, which were ordered to finish, may still accept the probe"
                raise OSError(errno.EAGAIN, why)
        address, listening = found.ensure_address(socket_number), found.socket_for(socket_number)
        place = found.index, socket_number
        waits = partial(_waits, listening, address)
        identity, closing = found.identity(socket_number), socket_snapshot.closing
        options, serving = closing(listening), found.socket_for(self._turns.number_for(found))

        def is_unchanged() -> bool:
            """Return whether the address still leads to the socket.

            Also return False if an option that can keep clients out has changed.
            """
            with suppress(OSError):
                is_same = found.identity(socket_number) == identity
                return is_same and found.is_alive(socket_number) and closing(listening) == options
            return False

        if listening.family == socket.AF_UNIX:  # the socket has its own file: no mark is needed
            no_clients = self._steering.steer() and self._is_for_probes(found, socket_number)
            self._record_source(place, None, no_clients=no_clients)
            return ProbeTarget(address, None, waits, lambda: None, is_unchanged=is_unchanged)
        while (mark := bpf.Mark.draw(address[0])) in self.socket_by_mark:
            pass  # draw again: IPv6 has few marks
        self.socket_by_mark[mark] = socket_number
        with on_error(self.socket_by_mark.pop, mark):
            if not self._steering.steer():  # the probe might reach the old generation
                raise OSError(errno.EAGAIN, "new clients cannot be steered now")
            no_clients = self._is_for_probes(found, socket_number)
        self._record_source(place, mark, no_clients=no_clients)
        close = partial(self._release_mark, mark)

        def may_refuse() -> bool:
            return options != closing(serving)

        return ProbeTarget(
            address, mark, waits, close, is_unchanged=is_unchanged, may_refuse_clients=may_refuse
        )

    def _is_for_probes(self, listener: Listener, number: int) -> bool:
        """Return whether a socket gets only probes, and nothing waits there yet.

        Call this only after Steering.steer(): until then, clients might still come to the socket.
        """
        gets_clients = self._turns.gets_clients(listener, number)
        return not gets_clients and not _has_waiting(listener.socket_for(number))

    def can_probe(self, name: str) -> bool:
        """Return whether reach_by_mark() finds a listener of this name."""
        return self._listener_to_probe(name) is not None

    def _listener_to_probe(
        self, name: str, knows: Callable[[int], bool] = lambda index: True
    ) -> Listener | None:
        pairs = [each for each in self._listeners.pairs if not each.lost]
        return self._first(pairs, name, knows)

    @staticmethod
    def _first(
        listeners: Iterable[Listener], name: str, knows: Callable[[int], bool]
    ) -> Listener | None:
        """Return the first matching listener; prefer a listener whose interface exists."""
        named = (e for e in listeners if name in ("", e.settings.name) and knows(e.index))
        return min(named, key=lambda each: each.lacks_interface, default=None)

    def _release_mark(self, mark: bpf.Mark) -> None:
        """Stop steering connections with this mark."""
        if self.socket_by_mark.pop(mark, None) is not None:
            self._steering.steer()

    def _probes_at(self, listener: Listener, number: int) -> int | None:
        """Return how many probes wait at a listener's socket; None: a client might wait, too.

        Raises OSError.
        """
        waiting, probes = self.waiting_at(listener, number)
        return waiting if waiting <= probes else None

    def waiting_at(self, listener: Listener, number: int) -> tuple[int, int]:
        """Return how many connections wait at a listener's socket, and how many of them are probes.

        If no probe can wait there, we do not count: the result is (1, 0) for one or more clients.
        Raises OSError.
        """
        listening, place = listener.socket_for(number), (listener.index, number)
        if not listener.has_waiting(number):
            return 0, 0
        abandoned = {end for where, end in self._abandoned if where is listening}
        sources = {each[2] for each in self.probe_sources if each[:2] == place}
        if place in self.probed:
            sources.add(bpf.source_of_ipv6(listener.local_address[0]))
        if not (abandoned or sources):
            return 1, 0
        # Count before listing.  discard() removes only the counted number of connections, from the
        # queue's head, so a connection that arrives after the count stays.
        waiting, _ = reuseport.queue(listening)
        if listening.family == socket.AF_UNIX and place in self.probed:
            return waiting, waiting
        ends = unaccepted(listening)
        gone = {0} if abandoned else set()  # unaccepted() lists a closed UNIX connection as 0
        ours = [end for end in ends if end in abandoned | gone or bpf.comes_from(end, sources)]
        return waiting, len(ours)

    def clients_wait(self, listener: Listener, number: int) -> bool:
        """Return whether a client waits, or might wait, at a listener's socket."""
        try:
            return self._probes_at(listener, number) is None
        except OSError:
            return True

    def waiting(
        self, generation: int, knows: Callable[[int], bool], *, clients_only: bool = False
    ) -> int | None:
        """Return how many connections wait for a generation to accept them; None: unknown.

        clients_only: do not count a socket where only probes wait.  knows: returns whether the
        generation knows a listener, by index.
        """
        if generation not in self._turns.accepting:
            return 0
        number, count = self._turns.accepting[generation], 0
        for each in self._listeners.living:
            if not knows(each.index):
                continue
            if clients_only and not self.clients_wait(each, number):
                continue
            if len(self._turns.accepting_at(each, number)) > 1:
                return None  # another generation accepts from this socket, too
            listening = each.socket_for(number)
            try:
                unix = listening.family == socket.AF_UNIX
                count += len(unaccepted(listening)) if unix else reuseport.queue(listening)[0]
            except (OSError, struct.error):
                return None
        return count

    def discard(self) -> set[tuple[int, int]]:
        """Discard probes where no worker accepts, so that no generation starts only for probes.

        If a client waits beside the probes, the probes stay: the generation that starts for the
        client also accepts the probes.  Returns the sockets, by listener and number, where
        discarding failed, but may succeed later.
        """
        unreadable, before = set(), self.probed.copy()
        for each, number in [(each, number) for each in self._listeners.pairs for number in (0, 1)]:
            is_assigned = number in self._turns.accepting.values()
            is_accepted = is_assigned and self._turns.is_served(each, number)
            if is_accepted or each not in self._turns.not_given_back(self._listeners.pairs, number):
                continue
            listening, place = each.socket_for(number), (each.index, number)
            try:
                waiting = self._probes_at(each, number)
                if waiting is None:
                    continue
                reuseport.discard_waiting(listening, waiting)
            except OSError as error:
                if error.errno in RETRY_ERRNOS | TRANSIENT_ERRNOS:
                    unreadable.add(place)
                continue
            self._abandoned = [each for each in self._abandoned if each[0] is not listening]
            self.probe_sources = {entry for entry in self.probe_sources if entry[:2] != place}
            self.probed.discard(place)
            self._marks.pop(place, None)
        if self.probed != before:
            # Write the state before such a place gets a socket at which clients of a hold wait
            # (SocketSteering.adopt_held()), as clients_come() does.
            self._persist()
        return unreadable

    def clients_come(self, places: set[tuple[int, int]]) -> None:
        """Record that these sockets, by listener and number, get clients from now on."""
        if not places.isdisjoint(self.probed):
            self.probed -= places
            # Write the state before the first client comes.  Otherwise, after a kill, the next
            # program could take the client for a probe, and discard the client.
            self._persist()
