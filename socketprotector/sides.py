"""Where the workers of a generation accept, under --handoff listener.

Each address has two sockets (twin.py), and of two generations that follow each other each has its
own: new clients come to the one whose turn it is, from the moment at which it is ready.  So the one
before can accept in peace who had come to it, and read what they have to say, before it is told
to finish: it gets nobody new whom it would take in and then close.

A listener without a second socket is common to both, as everywhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import twin
from .half_open import half_open
from .listener import Listener
from .log import Log
from .loop import Loop

#: Nobody has come for so long: then who was accepted has said what he wants.
QUIET_S = 1.0
#: One that has not accepted all by then is told to finish nevertheless.
LAST_S = 10.0
_LOOK_S = 0.1
_STEER_AGAIN_S = 0.5
#: Clients that nobody accepts are given a generation of their own so often at most.
FIRST_RESCUE_S = 1.0
LAST_RESCUE_S = 600.0

_RESCUE = "sides-rescue"


@dataclass(slots=True)
class _Parting:
    """A generation that gets nobody new any more."""

    began: float
    quiet_since: float


class Sides:
    """Knows who accepts where: the generations' numbers, and 0 or 1 for their sockets."""

    def __init__(
        self,
        listeners: Callable[[], Sequence[Listener]],
        *,
        loop: Loop,
        log: Log,
        parted: Callable[[int], None],
        stranded: Callable[[], None],
    ) -> None:
        """listeners: those that there are; their owner's.

        parted: a generation has accepted who came to it.  stranded: clients wait where nobody
        accepts.
        """
        self._listeners = listeners
        self._loop = loop
        self._log = log
        self._parted = parted
        self._stranded = stranded
        self.current = 0  # to which new clients come
        self._accepting: dict[int, int] = {}  # generation -> side
        self._parting: dict[int, _Parting] = {}
        self._steered = True  # the kernel knows the current one
        self._handshakes: frozenset[tuple[int, bytes]] = frozenset()  # begun at the other side
        self._rescue_s = FIRST_RESCUE_S
        self._rescued_at = 0.0

    @property
    def free(self) -> int:
        """The side that the next generation gets."""
        return 1 - self.current if self.current in self._accepting.values() else self.current

    def enter(self, generation: int, side: int) -> None:
        """The workers of a generation accept there from now on."""
        self._accepting[generation] = side
        self._watch()

    def leave(self, generation: int) -> None:
        """They do not any more: they were told to finish, or are gone."""
        self._accepting.pop(generation, None)
        if self._parting.pop(generation, None) is not None:
            self._loop.cancel(("part", generation))
        self._watch()

    def expect(self, listener: Listener) -> None:
        """Have those who connect to a new listener come to the generation that is to know it."""
        try:
            if listener.second is not None:
                twin.steer(listener.socket, self.free)
        except OSError:
            pass  # it is tried again when that generation has its turn

    def turn_to(self, side: int) -> None:
        """Have new clients come to a side."""
        if side != self.current:
            self._handshakes = self._under_way()
        self.current = side
        self._steer()
        self._watch()

    def part(self, generation: int) -> None:
        """Say when a generation whose turn is over has accepted who came to it."""
        if generation not in self._accepting or not self._pairs:
            self._parted(generation)
            return
        now = time.monotonic()
        self._parting[generation] = _Parting(now, now)
        self._look(generation)

    # -- whose turn it is --------------------------------------------------------

    @property
    def _pairs(self) -> list[Listener]:
        return [each for each in self._listeners() if each.second is not None]

    def _steer(self) -> None:
        """Tell the kernel; until it is told they come to the other side, which goes on."""
        try:
            for each in self._pairs:
                twin.steer(each.socket, self.current)
        except OSError as error:
            if self._steered:
                self._log.write("error", "not-steered", error=error.strerror)
            self._steered = False
            self._loop.call_after("steer", _STEER_AGAIN_S, self._steer)
        else:
            self._steered = True
            self._loop.cancel("steer")

    # -- the one before ------------------------------------------------------------

    def _look(self, generation: int) -> None:
        parting, side = self._parting[generation], self._accepting[generation]
        now = time.monotonic()
        waiting = any(each.has_waiting(side) for each in self._pairs)
        self._handshakes &= self._under_way() if self._handshakes else frozenset()
        if waiting or self._handshakes or not self._steered:
            parting.quiet_since = now
        if not self._steered:
            parting.began = now
        late = now - parting.began >= LAST_S
        if late or now - parting.quiet_since >= QUIET_S:
            if waiting:
                hint = "its workers do not accept; what they leave is given to others"
                self._log.write("warning", "not-taken", generation=generation, hint=hint)
            del self._parting[generation]
            self._parted(generation)
            return
        self._loop.call_after(("part", generation), _LOOK_S, lambda: self._look(generation))

    def _under_way(self) -> frozenset[tuple[int, bytes]]:
        """Return the handshakes of all addresses; none where the kernel does not tell."""
        found: set[tuple[int, bytes]] = set()
        for each in self._pairs:
            try:
                known = half_open(each.socket.family, each.socket.getsockname()[1])
            except OSError:
                continue  # sock_diag is not there: QUIET_S is far longer than most take
            found.update((each.index, client) for client in known)
        return frozenset(found)

    # -- where nobody accepts --------------------------------------------------------

    def _watch(self) -> None:
        """Be told of whoever comes, or still waits, where nobody accepts."""
        other = 1 - self.current
        for each in self._pairs:
            self._loop.unwatch(each.of_side(0).fileno())
            self._loop.unwatch(each.of_side(1).fileno())
        # As long as nobody accepts at all they wait for who is to come.
        if not self._accepting or other in self._accepting.values():
            self._loop.cancel(_RESCUE)
        elif self._loop.due(_RESCUE) is None:
            try:
                for each in self._pairs:
                    self._loop.watch(each.of_side(other).fileno(), self._somebody_waits)
            except OSError:  # of epoll: no memory
                self._somebody_waits()

    def _somebody_waits(self) -> None:
        """Look again later: one that was told to finish may still accept him."""
        other = 1 - self.current
        for each in self._pairs:
            self._loop.unwatch(each.of_side(other).fileno())
        now = time.monotonic()
        if now - self._rescued_at > LAST_RESCUE_S:
            self._rescue_s = FIRST_RESCUE_S
        delay_s = max(self._rescue_s, self._rescued_at + self._rescue_s - now)
        self._loop.call_after(_RESCUE, delay_s, self._rescue)

    def _rescue(self) -> None:
        other = 1 - self.current
        waiting = [each for each in self._pairs if each.has_waiting(other)]
        if waiting:
            addresses = " ".join(each.settings.address for each in waiting)
            self._log.write("warning", "stranded", listen=addresses)
            self._rescued_at = time.monotonic()
            self._rescue_s = min(2 * self._rescue_s, LAST_RESCUE_S)
            self._stranded()
        self._watch()  # it may be that nobody could be opened now
