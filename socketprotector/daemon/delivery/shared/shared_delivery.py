"""The delivery in which workers accept from listening sockets that they share with the protector.

No connection passes through the protector.  Usually an address has two sockets: the old and the
new generation have one each.  The protector only selects which socket gets new clients
(socket_steering.py).
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

from ....core.events import BacklogEmptied
from ....model.listen_fds import worker_variables
from ....model.records import DeliveryRecord
from ....model.settings import ListenerSettings, Settings
from ....system.inherited import Inherited
from ....system.listener import Listener
from ....system.listeners import listener_of
from ...generation import OpenGeneration
from .. import LAST_S, QUIET_S, Delivery, Handles
from ..host import Host
from ..probe_target import ProbeTarget
from .accept_watch import AcceptWatch
from .listener_flags import ListenerFlags
from .open_counts import OpenCounts
from .removed_listeners import RemovedListeners
from .shared_listeners import SharedListeners
from .socket_steering import SocketSteering
from .turns import Share, Turns

_CLOSE = "listeners-close"


def _cannot_share(listener: Listener) -> str | None:
    """Return why two sockets cannot share a listener's clients; None: they can."""
    if listener.socket.family == socket.AF_UNIX:
        named = "a path leads" if listener.path else "its name leads"
        return f"is a UNIX socket: {named} to one socket at a time"
    if listener.has_sibling:
        return None
    if listener.settings.foreign:
        return "was passed in without a second socket"
    if listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT):
        return "has ?defer_accept, so it has one socket for all generations"
    return "has one socket for all generations"


class SharedDelivery(Delivery):
    """The owner of the listeners; SocketSteering knows which generation accepts from which socket.

    A generation's socket has the number 0 or 1, the same at each address (turns.py).
    """

    @classmethod
    def make_listener(
        cls, index: int, settings: ListenerSettings, fds: Sequence[int], again: tuple[int, ...]
    ) -> Listener:
        first, sibling, reserved = fds
        return listener_of(
            first, index, settings, shared=True, sibling=sibling, reserved=reserved, again=again
        )

    @classmethod
    def leave(cls, listeners: Collection[Listener], record: DeliveryRecord) -> tuple[str, ...]:
        turns = Turns()
        turns.adopt(record.steering)
        return tuple(filter(None, [each.leave(turns.number_for(each)) for each in listeners]))

    def __init__(self, host: Host, listeners: Collection[Listener]) -> None:
        self._host = host
        runtime = host.runtime
        self._loop, self._post, self._log = runtime.loop, runtime.post, runtime.log
        shared = SharedListeners(host, listeners)
        self._listeners = shared.all
        self.steering = SocketSteering(shared)
        self._removed = RemovedListeners(shared, self.steering)
        self._counts = OpenCounts(shared)
        self._flags = ListenerFlags(shared)
        self._route: int | None = None
        self._stay = False  # True: our own listeners survive this stop
        self._unrefused: list[Listener] = []  # get new clients although they are being closed

    # -- a generation ----------------------------------------------------------------

    def can_probe(self, listener: str) -> bool:
        # A UNIX path may have only one socket left.  Even then, the next generation may get a new
        # socket, which probes can reach.
        named = [each for each in self._listeners if listener in ("", each.settings.name)]
        return self.steering.probes.can_probe(listener) or any(each.path for each in named)

    def cannot_dry_run(self) -> str | None:
        for each in self._listeners:
            if not each.has_sibling:
                address = each.settings.address
                why = "so clients would reach the dry run's generation"
                return f"{address} has one socket for all generations, {why}"
        # Clients that cannot be steered might reach the dry run's generation.
        why = "new clients cannot be steered now; `status` shows why"
        return None if self.steering.is_steered else why

    def open(self, generation: OpenGeneration, queue: int, *, fresh: bool) -> None:
        number = self.steering.turns.free
        generation.update_record(socket_number=number)
        self.steering.enter(generation.record.number, number, fresh=fresh)
        others = [each for each in self._host.generations.values() if each is not generation]
        taken = {tag for each in others for tag in each.record.accept_tags}
        tags = self._counts.tag_sockets(number, taken)
        generation.update_record(accept_tags=tags)
        if not tags:
            self._stop_counting(others)
        self._flags.watch()

    def _stop_counting(self, others: Iterable[OpenGeneration]) -> None:
        """Forget the accept tags (open_counts.py) of these generations.

        Called when a newer generation has no known tags, for example because its sockets could not
        be tagged.  These sockets may still have the tags of the generations in `others`, and the
        newer generation's connections inherit these tags.  So counts by these tags might include
        the newer generation's connections.
        """
        for each in others:
            each.update_record(accept_tags=())

    def worker_handles(
        self, generation: OpenGeneration, slot: int, free: Iterator[int], settings: Settings
    ) -> Handles:
        number, socket_number = generation.record.number, generation.record.socket_number
        wanted = sorted(generation.record.knows or ())
        fds = {each.index: each.socket_for(socket_number).fileno() for each in self._listeners}
        if not fds.keys() >= set(wanted):
            why = "a listener was lost when the protector was killed; restart SocketProtector"
            raise OSError(errno.ENOTCONN, why)
        self.steering.note_new_worker(number, generation.knows)
        environment = worker_variables(number, slot=slot, master_pid=os.getpid())
        if settings.control is not None:
            environment["EINHORN_SOCK_PATH"] = settings.control.address.removeprefix("unix:")
        return Handles({next(free): fds[index] for index in wanted}, environment, "LISTEN_PID")

    def sockets_of(self, generation: OpenGeneration) -> frozenset[int]:
        number = generation.record.socket_number
        sockets = [each.socket_for(number) for each in self._listeners]
        return frozenset(os.fstat(each.fileno()).st_ino for each in sockets)

    def reach(
        self, generation: OpenGeneration, listener: str, *, as_client: bool = False
    ) -> ProbeTarget | None:
        found = None
        # While two generations share the clients, a probe that connects as clients do may reach
        # either generation.  So steer the probe by a mark, if possible.
        if not as_client or self.steering.turns.share is not None:
            found = self.steering.probes.reach_by_mark(
                generation.record.number, listener, generation.knows
            )
        if found is None and as_client:
            found = self.steering.reach_as_client(listener, generation.knows)
        return found

    def cannot_share(self, listeners: Collection[Listener]) -> str | None:
        if not self.steering.is_steered:
            return " ".join(self.steering.warnings)
        for each in listeners:
            if not each.lost and (why := _cannot_share(each)):
                return f"{each.settings.address} {why}"
        return None

    def route_to(
        self,
        generation: OpenGeneration | None,
        *,
        served_before: bool = False,
        sharing: OpenGeneration | None = None,
        share: int = 0,
    ) -> None:
        self._route = generation.record.number if generation is not None else None
        if sharing is not None:
            sharing.begin_share()
        if generation is not None:
            self.steering.turn_to(
                generation.record.socket_number,
                served_before=served_before,
                knows=generation.knows,
                share=self._share(generation, sharing, share) if sharing is not None else None,
            )
        else:
            self.steering.end_share()

    def _share(self, generation: OpenGeneration, sharing: OpenGeneration, share: int) -> Share:
        indices = (each.index for each in self._listeners)
        both = frozenset(n for n in indices if generation.knows(n) and sharing.knows(n))
        return Share(sharing.record.number, share, both)

    def met(self, generation: OpenGeneration) -> int | None:
        """Return how many clients the workers have accepted.

        None: no worker has counted them.  Workers on the client library count them.
        """
        return generation.met

    def begin_drain(
        self, generation: OpenGeneration, on_quiet: Callable[[], None], *, reads_on: bool
    ) -> None:
        self.steering.quiesce(generation.record.number, on_quiet, reads_on=reads_on)

    def drain(self, generation: OpenGeneration) -> None:
        generation.note_finishing()
        self.steering.leave(generation.record.number)
        self._removed.close_unaccepted()

    def release(self, generation: OpenGeneration) -> None:
        self.steering.forget(generation.record.number)
        self._removed.close_unaccepted()

    def keeps(self, number: int) -> bool:
        return False

    # -- counts ------------------------------------------------------------------------

    def waiting(self, generation: OpenGeneration, *, clients_only: bool = False) -> int | None:
        number = generation.record.number
        return self.steering.probes.waiting(number, generation.knows, clients_only=clients_only)

    def active(self, generation: OpenGeneration) -> int | None:
        return self._counts.active(generation.record.accept_tags)

    def untaken_s(self, generation: OpenGeneration) -> float | None:
        watch = self._watch_of(generation)
        return watch.untaken_s if watch is not None else None

    def is_stuck(self, generation: OpenGeneration | None) -> bool:
        watch = self._watch_of(generation) if generation is not None else None
        return watch is not None and watch.is_stuck()

    def _watch_of(self, generation: OpenGeneration) -> AcceptWatch | None:
        number, share = generation.record.number, self.steering.turns.share
        if share is not None and share.generation == number:
            return self.steering.canary_watch
        return self.steering.accept_watch if number == self._route else None

    def queue_limit(self, generation: OpenGeneration) -> int | None:
        return None

    # -- listeners -----------------------------------------------------------------------

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return tuple(self._listeners)

    def backlog(self, listener: Listener) -> tuple[int, int] | None:
        return listener.backlog(self.steering.turns.number_for(listener))

    @property
    def worker_sockets(self) -> frozenset[int]:
        sockets = [listening for each in self._listeners for listening in each.sockets]
        return frozenset(os.fstat(each.fileno()).st_ino for each in sockets)

    def cannot_change(
        self, added: Collection[Listener], removed: Collection[Listener]
    ) -> str | None:
        hold = self.steering.hold
        cannot = (hold.refusal(added) or hold.loss(removed)) if hold.on else None
        return f"clients are on hold, and {cannot}; end the hold first" if cannot else None

    def add(self, listener: Listener, *, dry_run: bool) -> None:
        self._listeners.append(listener)
        self.steering.expect(listener, dry_run=dry_run)

    def remove(self, listener: Listener) -> None:
        self._listeners.remove(listener)
        listener.refuse_new()
        self._removed.add(listener)

    def cannot_hold(self) -> str | None:
        return self.steering.hold.prepare()

    def hold(self, on: bool) -> None:
        self.steering.turn_hold(on)

    @property
    def is_silent(self) -> bool:
        return self.steering.hold.on

    @property
    def late_s(self) -> float:
        return self.steering.hold.late_s

    def close_listeners(
        self, serving: OpenGeneration | None, *, quick: bool, stay: bool = False
    ) -> None:
        self._stay = stay
        self.steering.give_back()
        # With `stay`, the next start gets the sockets, so SocketSteering must still repair sockets
        # that workers break.  end() would stop these repairs.
        if not stay:
            self.steering.end()
        if quick:
            self._close_listeners()
            return
        # New clients wait for the next start (`stay`), go to the socket's owner (passed-in
        # sockets), or are refused (other listeners).  So we wait only for clients that came before
        # this call.  If a listener cannot refuse new clients, we wait for its new clients, too, but
        # no longer than LAST_S.
        latest = float("inf") if stay else self._refuse_new()
        on_quiet = self._finish_closing if stay else partial(self._close_when_empty, latest)
        # quiesce_last() waits until the serving generation has accepted its clients and has read
        # from them.  We need this wait in two cases.  First, with `stay`: _finish_closing() does
        # not wait for clients.  Second, if we bound a second socket for a passed-in listener:
        # clients may wait at this socket, but _close_when_empty() skips passed-in listeners.
        if serving is not None and (stay or self.steering.has_passed_in_pair):
            self.steering.quiesce_last(serving.record.number, on_quiet, latest)
        else:
            on_quiet()

    def _finish_closing(self) -> None:
        """Close the listeners that do not survive this stop, and post BacklogEmptied."""
        self._close_listeners()
        self._post(BacklogEmptied())

    def _refuse_new(self) -> float:
        """Refuse new clients; return the deadline of `_unrefused`, by time.monotonic()."""
        ours = [each for each in self._listeners if not each.settings.foreign]
        self._unrefused = [each for each in ours if not each.refuse_new()]
        return time.monotonic() + LAST_S if self._unrefused else float("inf")

    def _close_when_empty(self, latest: float, *, again: bool = False) -> None:
        """Finish closing once workers have accepted all waiting clients that they can accept.

        We look for waiting clients every QUIET_S; the first call does not look.  If every listener
        was passed in or is lost, `awaited` is empty: finish at once.
        latest: when we stop waiting for the clients of `_unrefused`, by time.monotonic().  again:
        False at the first call.
        """
        # A passed-in listener might never become empty, because its owner keeps listening.
        awaited = [e for e in self._listeners if not (e.settings.foreign or e.lost)]
        if time.monotonic() > latest:
            awaited = [each for each in awaited if each not in self._unrefused]
        # Do not wait for clients that no worker will accept, such as the clients at the socket of
        # an abandoned generation.
        empty = again and not any(map(self.steering.clients_may_be_accepted, awaited))
        if empty or not awaited:
            self._finish_closing()
            return
        look = partial(self._close_when_empty, latest, again=True)
        self._loop.call_after(_CLOSE, QUIET_S, look)

    def _close_listeners(self) -> None:
        """Close all listeners that do not survive a stop."""
        self._loop.cancel(_CLOSE)
        for each in self.listeners:
            if each.settings.foreign or not self._stay:
                self._removed.report_lost(each)
                self._listeners.remove(each)
                self._removed.close(each)

    # -- the delivery as a whole ---------------------------------------------------------

    @property
    def forwarded(self) -> int | None:
        return None

    @property
    def lost(self) -> int | None:
        return None

    @property
    def idle_s(self) -> float:
        return 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.steering.warnings

    def accept_waiting(self) -> None:
        pass  # workers accept without us

    def record(self) -> DeliveryRecord:
        return DeliveryRecord(steering=self.steering.record(), nonblocking=self._flags.record())

    def descriptors(self) -> dict[str, int]:
        kept = (*self._listeners, *self._removed.listeners)
        return {n: fd for each in kept for n, fd in each.descriptors().items()}

    def adopt(
        self, record: DeliveryRecord, unclaimed: Inherited, *, held: bool, closing: bool
    ) -> None:
        # Restore the flags first: systemd may have made a passed-in socket blocking, and running
        # workers would block in accept().
        self._flags.adopt(record.nonblocking)
        self.steering.adopt_record(record.steering, held=held)
        if closing:
            self.steering.end()  # do not repair sockets that we have shut down ourselves

    def adopt_generation(
        self, generation: OpenGeneration, descriptors: Mapping[str, int], *, draining: bool
    ) -> bool:
        # An earlier version of SocketProtector also made a channel in this mode: close the
        # channel's ends.
        for fd in descriptors.values():
            os.close(fd)
        # Earlier versions of SocketProtector had other tags, below 2 ** 32, at a UNIX path.
        paths = [each.index for each in self._listeners if each.path]
        if any(index in paths and tag < 1 << 32 for index, tag in generation.record.accept_tags):
            generation.update_record(accept_tags=())
        # If the record has no tags, perhaps the protector was killed before open() could tag the
        # sockets.  This generation's connections may then carry earlier generations' tags.
        if not generation.record.accept_tags:
            number = generation.record.number
            self._stop_counting(each for n, each in self._host.generations.items() if n < number)
        if not (generation.is_finishing or generation.record.released):
            self.steering.adopt(generation.record.number, generation.record.socket_number)
        return True

    def close(self) -> tuple[str, ...]:
        self.steering.end()
        self._close_listeners()
        surviving = []
        for each in self._listeners:
            number = self.steering.turns.number_for(each)
            self._removed.report_lost(each, (number,) if each.is_alive(number) else ())
            surviving.append(each.leave(number))
        self._removed.close_all()
        self._listeners.clear()
        return tuple(filter(None, surviving))
