"""How clients reach workers: the contract, and a folder for each of the two ways.

queue/: the protector accepts, and hands over.  shared/: workers accept, from shared sockets.
Neither imports from the other.  choice.py says which one is built; all else knows `Delivery`.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping

from ...model.lazy_dataclass import frozen, mutable
from ...model.records import DeliveryRecord
from ...model.settings import Settings
from ...system.inherited import Inherited
from ...system.listener import Listener
from ..generation import OpenGeneration
from ..runtime import Runtime
from .probe_target import ProbeTarget

#: After how long it is reported that no worker takes: if none ever did, and if one has before.
NEVER_TAKEN_S = 5.0
UNTAKEN_S = 30.0
#: Handshakes that are under way finish in so long, or begin again: a stop looks so often whether a
#: client has come.
QUIET_S = 0.2
#: Where new clients cannot be refused they might come for ever: listeners close after so long.
LAST_S = 10.0


@mutable
class Host:
    """What the process that builds a delivery gives it."""

    runtime: Runtime
    #: The open generations, by number.
    generations: Mapping[int, OpenGeneration]
    #: Called when a listener gets no more clients, with the reason.
    lost: Callable[[Listener, str], None]
    #: Called when a listener has another socket file.
    bound: Callable[[Listener], None]
    #: For so many seconds no worker has taken any of so many clients, whether any ever was taken,
    #: and at which addresses they wait; None: in the queue.  Called once for each route.
    untaken: Callable[[float, int, bool, str | None], None]
    #: Returns a TCP connection of ours to the generation that serves, if there is one.
    own_connection: Callable[[], socket.socket | None]


@frozen
class Handles:
    """The descriptors from which a worker takes connections, and how it finds them."""

    descriptors: dict[int, int]  # number there -> ours
    environment: dict[str, str]  # describes the descriptors to the worker
    pid_in: str = ""  # the variable that holds the worker's pid


class Delivery(ABC):
    """Brings new clients to the workers of the generation that has the route.

    Each order may be carried out twice: after a kill, the next program repeats it.
    """

    #: Whether workers get the listening sockets.
    shares_listeners: bool

    @abstractmethod
    def __init__(self, host: Host, listeners: Collection[Listener]) -> None:
        """Take ownership of the listeners."""

    # -- a generation, in the order of its life ----------------------------------

    @abstractmethod
    def can_ask(self, listener: str) -> bool:
        """Say whether reach() reaches a generation that has no clients yet; listener: see there."""

    @abstractmethod
    def cannot_try(self) -> str | None:
        """Say why a generation cannot start without getting clients; None: it can."""

    @abstractmethod
    def open(self, generation: OpenGeneration, queue: int, *, fresh: bool) -> None:
        """Make what the workers of a generation will need.  On OSError nothing is left open.

        queue: how many clients a queue can hold.  fresh: the generation is a new release.
        """

    @abstractmethod
    def worker_handles(
        self, generation: OpenGeneration, slot: int, free: Iterator[int], settings: Settings
    ) -> Handles:
        """Return the handles of a worker that is about to start.  Raises OSError.

        free: the numbers that its descriptors may have.
        """

    @abstractmethod
    def reach(
        self, generation: OpenGeneration, listener: str, *, as_client: bool = False
    ) -> ProbeTarget | None:
        """Return how to probe a generation, with or without the route; None: it is impossible.

        listener: its name, "" for the first.  as_client: the generation has the route, and the
        probe reaches it as clients do.  Raises OSError if it cannot be reached now.
        """

    @abstractmethod
    def route_to(self, generation: OpenGeneration | None, *, again: bool = False) -> None:
        """Bring new clients to this generation; None: to none, so that they wait.

        again: it has had the route before.
        """

    @abstractmethod
    def begin_drain(
        self, generation: OpenGeneration, on_quiet: Callable[[], None], *, reads_on: bool
    ) -> None:
        """Call back when a generation without the route may be ordered to finish.

        Then it has accepted all its clients, and read from each.  reads_on: its workers still
        read from accepted clients after that order, so only accepting is waited for.
        """

    @abstractmethod
    def drain(self, generation: OpenGeneration) -> None:
        """Bring a generation no more clients, and take back those that it has not accepted."""

    @abstractmethod
    def release(self, generation: OpenGeneration) -> None:
        """Let go of a generation that has no workers any more."""

    @abstractmethod
    def keeps(self, number: int) -> bool:
        """Say whether clients of a generation that was released wait for another one."""

    # -- what is known of it -------------------------------------------------------

    @abstractmethod
    def waiting(self, generation: OpenGeneration, *, clients_only: bool = False) -> int | None:
        """Return how many clients wait for its workers; None: it is not known.

        clients_only: 0 where only probes of ours do.
        """

    @abstractmethod
    def active(self, generation: OpenGeneration) -> int | None:
        """Return how many connections are open that it has accepted; None: it is not known.

        For workers that do not count them.
        """

    @abstractmethod
    def oldest_waiting_s(self, generation: OpenGeneration) -> float | None:
        """Return for how long it has accepted no waiting client; None: too short to report."""

    @abstractmethod
    def queue_limit(self, generation: OpenGeneration) -> int | None:
        """Return for how many clients its queue has room; None: there is none."""

    # -- listeners -------------------------------------------------------------------

    @property
    @abstractmethod
    def listeners(self) -> tuple[Listener, ...]:
        """The listeners that clients come to."""

    @abstractmethod
    def number_for(self, listener: Listener) -> int:
        """Return to which socket of a listener new clients come."""

    @abstractmethod
    def cannot_add(self, listeners: Collection[Listener]) -> str | None:
        """Say why these cannot be added now; None: they can."""

    @abstractmethod
    def add(self, listener: Listener, *, dry_run: bool) -> None:
        """Add a listener, for the generations that know it; takes ownership.

        dry_run: the generation that will know it gets no clients.
        """

    @abstractmethod
    def remove(self, listener: Listener) -> None:
        """Refuse new clients of a listener, and serve its connected clients."""

    @abstractmethod
    def cannot_hold(self) -> str | None:
        """Say why there can be no hold; None: there can."""

    @abstractmethod
    def hold(self, on: bool) -> None:
        """Bring no client to a worker, and refuse none."""

    @property
    @abstractmethod
    def is_silent(self) -> bool:
        """Whether a client that connects now gets no answer."""

    @property
    @abstractmethod
    def late_s(self) -> float:
        """For how long clients may still come that a hold has kept out."""

    @abstractmethod
    def close_listeners(
        self, serving: OpenGeneration | None, *, quick: bool, stay: bool = False
    ) -> None:
        """Refuse new clients; quick: close at once.  Otherwise BacklogEmptied follows.

        stay: later clients wait for the next start, so our own listeners survive.
        """

    # -- the whole ---------------------------------------------------------------------

    @property
    @abstractmethod
    def forwarded(self) -> int | None:
        """How many connections we accepted to hand over; None: workers accept."""

    @property
    @abstractmethod
    def lost(self) -> int | None:
        """How many forwarded connections were lost on the way."""

    @property
    @abstractmethod
    def idle_s(self) -> float:
        """For how long no client has come; 0 while one waits, or where that is not known."""

    @property
    @abstractmethod
    def warnings(self) -> tuple[str, ...]:
        """What only a restart repairs."""

    @abstractmethod
    def look(self) -> None:
        """Serve clients while something long keeps the loop from it."""

    @abstractmethod
    def record(self) -> DeliveryRecord:
        """Return what the next program has to know."""

    @abstractmethod
    def descriptors(self) -> dict[str, int]:
        """Return what the next program needs, by name."""

    @abstractmethod
    def adopt(
        self, record: DeliveryRecord, unclaimed: Inherited, *, held: bool, closing: bool
    ) -> None:
        """Resume from an earlier program's record; takes descriptors that are no generation's.

        held: a hold must be in force.  closing: the listeners are about to be closed.
        """

    @abstractmethod
    def adopt_generation(
        self, generation: OpenGeneration, descriptors: Mapping[str, int], *, draining: bool
    ) -> bool:
        """Adopt a generation that an earlier program opened; takes ownership of its descriptors.

        draining: it drains already.  Returns False if its descriptors were not stored in time: then
        it never got a client.
        """

    @abstractmethod
    def close(self) -> tuple[str, ...]:
        """Close everything; return the names of the sockets that live on for the next start."""
