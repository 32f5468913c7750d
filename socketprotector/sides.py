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
from .listener import Listener
from .log import Log
from .loop import Loop
from .unheard import unheard

_LOOK_S = 0.1
#: All who had come are heard, and so it has been for so long.
QUIET_S = 1.0
#: Who has connected and says nothing is awaited for so long.
SILENT_S = 3.0
#: One that has not accepted and read all by then is told to finish nevertheless.
LAST_S = 10.0
#: To ask the kernel takes at most this share of our time, however many connections there are.
_ASKING_SHARE = 0.1
_STEER_AGAIN_S = 0.5
#: Clients that nobody accepts are given a generation of their own so often at most.
FIRST_RESCUE_S = 1.0
LAST_RESCUE_S = 600.0

_RESCUE = "sides-rescue"


@dataclass(slots=True)
class _Parting:
    """A generation that gets nobody new any more."""

    began: float
    # In looks, for a machine that stood still in between has heard nobody meanwhile.
    looks: int = 0
    quiet_looks: int = 0


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

        parted: a generation has accepted and read who came to it.
        stranded: clients wait where nobody accepts.
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
        # Who had come before, and whether he is silent.
        self._unheard: dict[tuple[int, bytes], bool] = {}
        self._asking_s = 0.0
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
        self.current = side
        self._steer()
        self._watch()

    def part(self, generation: int) -> None:
        """Say when a generation whose turn is over has accepted who came to it."""
        if generation not in self._accepting or not self._pairs:
            self._parted(generation)
            return
        self._parting[generation] = _Parting(time.monotonic())
        self._unheard = self._ask()  # and whoever has come to the other side just now
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
        now, self._asking_s = time.monotonic(), 0.0
        waiting = any(each.has_waiting(side) for each in self._pairs)
        if not self._steered:  # they still come here
            self._unheard = self._ask()
            parting.began, parting.looks = now, 0
        elif self._unheard:
            still = self._ask()
            self._unheard = {who: still[who] for who in self._unheard if who in still}
        parting.looks += 1
        parting.quiet_looks += 1
        if waiting or not self._steered or not all(self._unheard.values()):
            parting.quiet_looks = 0
        quiet = parting.quiet_looks * _LOOK_S > QUIET_S
        awaited = self._unheard and parting.looks * _LOOK_S < SILENT_S
        late = now - parting.began >= LAST_S
        if late or (quiet and not awaited):
            if waiting:
                hint = "its workers do not accept; what they leave is given to others"
                self._log.write("warning", "not-taken", generation=generation, hint=hint)
            del self._parting[generation]
            self._parted(generation)
            return
        delay_s = max(_LOOK_S, self._asking_s / _ASKING_SHARE)
        self._loop.call_after(("part", generation), delay_s, lambda: self._look(generation))

    def _ask(self) -> dict[tuple[int, bytes], bool]:
        """Return who has not been heard at any address; nobody where the kernel does not tell."""
        began = time.monotonic()
        found: dict[tuple[int, bytes], bool] = {}
        for each in self._pairs:
            try:
                known = unheard(each.socket.family, each.socket.getsockname()[1])
            except OSError:
                continue  # sock_diag is not there: QUIET_S is far longer than most take
            found.update(((each.index, client), silent) for client, silent in known.items())
        self._asking_s = time.monotonic() - began
        return found

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
