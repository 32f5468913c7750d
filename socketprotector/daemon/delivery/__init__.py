"""The interface of a delivery, which brings clients to workers.

In queue/, the protector accepts connections and hands them to workers.  In shared/, workers accept
from sockets that they share with the protector.  Neither folder imports from the other.  Outside
these folders only choice.py, which selects the delivery, imports from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from ...model.lazy_dataclass import frozen
from ...model.records import DeliveryRecord
from ...model.settings import ListenerSettings, Settings
from ...system.inherited import Inherited
from ...system.listener import Listener
from ..generation import OpenGeneration
from .host import Host
from .probe_target import ProbeTarget

#: We report workers that have accepted no waiting client for UNTAKEN_S, or for NEVER_TAKEN_S if
#: these workers have never accepted a client.  In shared/, each listener is timed separately.
#: For a canary, a shorter time replaces NEVER_TAKEN_S (queue/canary.py, shared/canary_watch.py).
NEVER_TAKEN_S = 5.0
UNTAKEN_S = 30.0
#: A stop, and the drain of a removed listener, check for new clients at this interval, and end when
#: no more clients come.  Handshakes that are under way complete within the interval, so no client
#: is missed, unless the network loses or delays a packet.
QUIET_S = 0.2
#: A stop, and the drain of a removed listener, wait at most this long for clients if new clients
#: cannot be refused.  But queue/ waits longer if it has not yet sent all connections that it has
#: accepted.
LAST_S = 10.0


def untaken_message(seconds: float, *, ever: bool) -> str:
    """Return the message about workers that accept no client.

    seconds: the time without an accepted client.
    ever: whether the workers may have accepted a client before.  In shared/: whether they may have
    done so at each listener where clients wait.
    """
    return f"no worker has accepted a connection {f'for {seconds:.0f} s' if ever else 'yet'}"


@frozen
class Handles:
    """A worker's descriptors for connections, and the variables that tell the worker about them."""

    descriptors: dict[int, int]  # descriptor in the worker -> our descriptor
    environment: dict[str, str]
    pid_in: str = ""  # the name of the variable that gets the worker's pid; "": no variable


class Delivery(ABC):
    """Brings new clients to the workers of the generation that has the route.

    A generation knows a listener if the listener was configured when the generation was opened.
    Only such a generation can get the listener's clients.  The simplest delivery is
    tests/memory_delivery.py.

    If the protector is killed, the program that replaces it (the next program) may repeat calls,
    such as route_to() or drain().  A repeated call must change nothing.
    """

    @classmethod
    @abstractmethod
    def make_listener(
        cls, index: int, settings: ListenerSettings, fds: Sequence[int], again: tuple[int, ...]
    ) -> Listener:
        """Make a listener from its first socket, its sibling and the reserved socket.

        fds: the three descriptors (see Listener); -1: no such socket.
        again: for each of the three sockets, how often another socket has taken its place.  The
        name of the socket's descriptor contains this number, so no name is used twice.
        """

    @classmethod
    @abstractmethod
    def leave(cls, listeners: Collection[Listener], record: DeliveryRecord) -> tuple[str, ...]:
        """Complete the exit that an earlier program began: leave the listeners to the fd store.

        Returns the names of the sockets that the store must keep for the next start.
        """

    @abstractmethod
    def __init__(self, host: Host, listeners: Collection[Listener]) -> None:
        """Take ownership of the listeners."""

    # -- a generation, in the order of its life ----------------------------------

    @abstractmethod
    def can_probe(self, listener: str) -> bool:
        """Return whether a probe can reach a generation that has no clients yet.

        listener: see reach().
        """

    @abstractmethod
    def cannot_dry_run(self) -> str | None:
        """Return why a dry run is impossible; None: it is possible."""

    @abstractmethod
    def open(self, generation: OpenGeneration, queue: int, *, fresh: bool) -> None:
        """Prepare the sockets from which a generation's workers will take connections.

        Raises OSError on failure; then the caller forgets the generation without calling release().

        queue: how many clients the generation's queue should hold (shared/ has no queue).
        fresh: True: the generation runs the command as it is now.  False: the generation runs the
        last good command, if there is one.
        """

    @abstractmethod
    def worker_handles(
        self, generation: OpenGeneration, slot: int, free: Iterator[int], settings: Settings
    ) -> Handles:
        """Return the handles for a worker that is about to start.  Raises OSError.

        slot: the worker's number in its generation.  free: unused descriptor numbers of the worker.
        """

    @abstractmethod
    def sockets_of(self, generation: OpenGeneration) -> frozenset[int]:
        """Return the inodes of the sockets from which a generation's workers take connections."""

    @abstractmethod
    def reach(
        self, generation: OpenGeneration, listener: str, *, as_client: bool = False
    ) -> ProbeTarget | None:
        """Return the target for probes of a generation; None: no probe is possible.

        listener: the listener's name; "": the first listener that the generation knows and that
        can be probed.  as_client: in shared/, connect as clients do; the generation must have the
        route.

        Raises OSError if the generation cannot be reached now.
        """

    @abstractmethod
    def cannot_share(self, listeners: Collection[Listener]) -> str | None:
        """Return why two generations cannot share these listeners' new clients; None: they can."""

    @abstractmethod
    def route_to(
        self,
        generation: OpenGeneration | None,
        *,
        served_before: bool = False,
        sharing: OpenGeneration | None = None,
        share: int = 0,
    ) -> None:
        """Bring new clients to this generation; None: let new clients wait.

        served_before: the generation has had the route or a share of the clients before.
        sharing: another generation, which gets `share` ten-thousandths of the new clients at
        listeners that both generations know.
        """

    @abstractmethod
    def met(self, generation: OpenGeneration) -> int | None:
        """Return how many new clients a generation has got so far; None: unknown.

        queue/ counts a client when its connection is accepted for the generation's queue.  shared/
        counts a client when a worker has accepted the connection.
        """

    @abstractmethod
    def begin_drain(
        self, generation: OpenGeneration, on_quiet: Callable[[], None], *, reads_on: bool
    ) -> None:
        """Call on_quiet when a generation without the route can be ordered to finish.

        queue/ calls on_quiet at once.  In shared/, clients may wait at a socket that only this
        generation's workers have.  Workers that are ordered to finish might close the connections
        of clients that they have not accepted, or have not read from.  So shared/ first waits, for
        a limited time, until the workers have accepted all clients and have read from each client.
        reads_on: whether the workers read from accepted clients even after the order to finish.  If
        they do, shared/ waits only until the clients are accepted.
        """

    @abstractmethod
    def drain(self, generation: OpenGeneration) -> None:
        """Stop bringing clients to a generation, whose workers must finish now.

        The caller has sent the finish signal, if the program has one.  In queue/, the workers read
        end of file from the channel.  Other generations may get the clients that these workers have
        not accepted.
        """

    @abstractmethod
    def release(self, generation: OpenGeneration) -> None:
        """Free what a generation used, after its last worker has exited."""

    @abstractmethod
    def keeps(self, number: int) -> bool:
        """Return whether a released generation's queue still holds clients.

        Another generation will get these clients.  shared/ returns False: it has no queue.
        """

    # -- counts --------------------------------------------------------------------

    @abstractmethod
    def waiting(self, generation: OpenGeneration, *, clients_only: bool = False) -> int | None:
        """Return how many connections wait for a generation's workers; None: unknown.

        clients_only: return 0 if all waiting connections are certainly probes.  A number above 0
        may include probes.
        """

    @abstractmethod
    def active(self, generation: OpenGeneration) -> int | None:
        """Return the number of a generation's open connections; None: unknown, as in queue/."""

    @abstractmethod
    def untaken_s(self, generation: OpenGeneration) -> float | None:
        """Return for how long a generation's workers have accepted no waiting client.

        None: no client waits, the time is below the limit for a report (see NEVER_TAKEN_S), or the
        generation gets no new clients.
        """

    @abstractmethod
    def is_stuck(self, generation: OpenGeneration | None) -> bool:
        """Return whether clients wait for a generation, and its workers accept none.

        Returns False if `generation` is None.
        """

    @abstractmethod
    def queue_limit(self, generation: OpenGeneration) -> int | None:
        """Return how many clients a generation's queue can hold; None: there is no queue."""

    # -- listeners -------------------------------------------------------------------

    @property
    @abstractmethod
    def listeners(self) -> tuple[Listener, ...]:
        """The listeners that were not removed, including lost listeners (Host.listener_lost())."""

    @abstractmethod
    def backlog(self, listener: Listener) -> tuple[int, int] | None:
        """Return how many clients wait at a listener, and how many can wait; None: unknown."""

    @property
    @abstractmethod
    def worker_sockets(self) -> frozenset[int]:
        """The inodes of the listening sockets that workers get."""

    @abstractmethod
    def cannot_change(
        self, added: Collection[Listener], removed: Collection[Listener]
    ) -> str | None:
        """Return why a reload cannot add and remove these listeners now; None: it can."""

    @abstractmethod
    def add(self, listener: Listener, *, dry_run: bool) -> None:
        """Add a listener, which we then own.  Generations that know the listener get its clients.

        dry_run: whether the next generation is a dry run.  Such a generation knows the listener,
        but gets no clients.
        """

    @abstractmethod
    def remove(self, listener: Listener) -> None:
        """Refuse a listener's new clients, but still bring its connected clients to workers.

        Exception: a passed-in socket refuses no client, because its owner (such as systemd) keeps
        listening.  The owner may also accept clients that already wait in the backlog.
        """

    @abstractmethod
    def cannot_hold(self) -> str | None:
        """Return why a hold is impossible; None: it is possible.

        In shared/, this call also makes the sockets where held clients will wait.
        """

    @abstractmethod
    def hold(self, on: bool) -> None:
        """Begin a hold, or end it if `on` is False.

        During a hold new clients reach no worker, but are not refused.
        """

    @property
    @abstractmethod
    def is_silent(self) -> bool:
        """Return whether a hold now stops probes that connect as clients do.

        Such probes use reach() with `as_client`.  queue/ returns False: its probes do not connect
        to a listener (queue/probe_sender.py).
        """

    @property
    @abstractmethod
    def late_s(self) -> float:
        """Return for how many more seconds TCP clients may retry after a hold; 0: none retries.

        queue/ returns 0: its held clients wait in the backlog.  In shared/, held TCP clients get no
        answer, so they retry.
        """

    @abstractmethod
    def close_listeners(
        self, serving: OpenGeneration | None, *, quick: bool, stay: bool = False
    ) -> None:
        """Refuse new clients, and post BacklogEmptied once all earlier clients are accepted.

        If new clients cannot be refused, accept them, too (see LAST_S).
        Exception: a passed-in socket refuses no client, because its owner (such as systemd) keeps
        listening.  The owner may also get clients that came before this call.
        serving: the serving generation.  quick: close at once, and post nothing.
        stay: do not refuse new clients.  Instead keep our own listeners (not passed in) open, where
        new clients wait for the next start.
        """

    # -- the delivery as a whole ---------------------------------------------------------

    @property
    @abstractmethod
    def forwarded(self) -> int | None:
        """Return how many connections the protector has accepted; None, in shared/: unknown."""

    @property
    @abstractmethod
    def lost(self) -> int | None:
        """Return how many connections the protector has accepted and then lost.

        None, in shared/: unknown.
        """

    @property
    @abstractmethod
    def idle_s(self) -> float:
        """Return the time since the last client; 0: a client waits.

        queue/: if no client has come since the protector was last started, upgraded or killed, the
        time of the last client is unknown.  Then this is the time since the machine's boot.
        shared/: always 0 (unknown).
        """

    @property
    @abstractmethod
    def warnings(self) -> tuple[str, ...]:
        """The present faults, as messages for `status`."""

    @abstractmethod
    def accept_waiting(self) -> None:
        """Accept the waiting clients; shared/ does nothing, because its workers accept clients.

        Called repeatedly during long work that blocks the loop.
        """

    @abstractmethod
    def record(self) -> DeliveryRecord:
        """Return the record that the next program needs."""

    @abstractmethod
    def descriptors(self) -> dict[str, int]:
        """Return the descriptors that the next program needs, by name."""

    @abstractmethod
    def adopt(
        self, record: DeliveryRecord, unclaimed: Inherited, *, held: bool, closing: bool
    ) -> None:
        """Resume from an earlier program's record; claim descriptors that belong to no generation.

        unclaimed: the inherited descriptors that no other part has claimed yet.
        held: whether a hold is in force.  closing: whether a stop is closing the listeners.
        """

    @abstractmethod
    def adopt_generation(
        self, generation: OpenGeneration, descriptors: Mapping[str, int], *, draining: bool
    ) -> bool:
        """Adopt a generation that an earlier program opened; take ownership of its descriptors.

        draining: whether the generation already drains.

        Returns False if needed descriptors were not stored: the earlier program was killed before
        it stored them, or the store had no room.
        """

    @abstractmethod
    def close(self) -> tuple[str, ...]:
        """Close everything; return the names of the sockets that survive for the next start."""
