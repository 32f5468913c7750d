"""--settle-check: asks the generation that has the route, as long as the one before it stands by.

By HTTP the asker asks, as before a generation serves (asking.py).  A command gets what is counted
of both generations, and decides by its own measure: it may ask at the probe address, or the
operator's metrics.

The first bad answer is the last: who asks twice before going back has clients fail meanwhile.  And
--settle is over with a good one alone, so that none that takes long comes too late.  What cannot
be asked for as long as an answer may take is as bad: nobody knows.

A hold makes no difference: what is asked here reaches the generation all the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from ..core.events import SettleFailed
from ..model import question
from ..model.errors import what_failed
from ..model.question import Question
from ..model.text import in_units
from ..system.check_command import LIMIT_S, CheckCommand
from .asker_client import KeptAsker
from .check_probe import CheckProbes
from .delivery.way import PROBE, SHUT_DOWN, Reach
from .generation import OpenGeneration
from .runtime import Runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Counts = Callable[[], Mapping[int, Mapping[str, Any]]]

_EVERY_S = 1.0
#: How soon after something of ours has failed it is tried again.
_AGAIN_S = 0.25
_NEXT, _LIMIT = "settle-check", "settle-check-limit"


class SettleCheck:
    """Carries out CheckSettling and StopChecking."""

    def __init__(self, runtime: Runtime, reach: Reach, probes: CheckProbes, counts: Counts) -> None:
        """counts: what is counted of the generations, by number, for a command to read."""
        self._loop, self._post = runtime.loop, runtime.post
        self._reach, self._probes = reach, probes
        self._counts = counts
        self._generation: OpenGeneration | None = None
        self._asked = Question("")
        self._opened = ExitStack()  # what was asked last: by whom, and how it is reached
        self._asker: KeptAsker | None = None
        #: Whether a good answer has come after --settle was over; None: it is not over.
        self._last_is_good: bool | None = None
        self._cannot = ""  # why it cannot be asked now

    def begin(self, generation: OpenGeneration) -> None:
        """Ask until it is to stop."""
        self.stop()
        if generation.program.settle_check:
            self._generation = generation
            self._asked = question.read_settle_check(generation.program.settle_check)
            self._last_is_good = None
            self.go_on()

    def stop(self) -> None:
        """Ask no more."""
        self.suspend()
        self._generation = None

    def suspend(self) -> None:
        """Ask no more in this program; the next one begins anew."""
        self._loop.cancel(_NEXT)
        self._loop.cancel(_LIMIT)
        self._opened.close()
        if self._generation is not None:
            self._probes.over(self._generation.record.number)

    def go_on(self) -> None:
        """There was no next one."""
        if self._generation is not None:
            self._await_answer()
            self._ask()

    def awaits(self, number: int) -> bool:
        """Whether a generation settles on, though its time is over, until its next good answer."""
        generation = self._generation
        if generation is None or generation.record.number != number:
            return False
        if self._last_is_good is None:
            self._last_is_good = False
        return not self._last_is_good

    @property
    def is_due(self) -> bool:
        """Whether --settle is over, and the next good answer is waited for."""
        return self._generation is not None and self._last_is_good is False

    # -- inside ------------------------------------------------------------------

    def _ask(self) -> None:
        generation = self._generation
        assert generation is not None
        try:
            if self._asked.kind == question.CHECK:
                self._run(generation)
            else:
                self._send_asker(generation)
        except (OSError, ValueError) as error:
            self._ask_anew(what_failed(error))

    def _ask_anew(self, why: str) -> None:
        """Nothing is known of it, for this reason."""
        self._opened.close()
        self._cannot = why
        if self._loop.due(_LIMIT) is None:  # a command's own was over
            self._loop.call_after(_LIMIT, LIMIT_S, self._is_late)
        self._loop.call_after(_NEXT, _AGAIN_S, self._ask)

    def _await_answer(self) -> None:
        self._cannot = ""
        self._loop.call_after(_LIMIT, LIMIT_S, self._is_late)

    def _is_late(self) -> None:
        asks = self._asker is not None and self._asker.now is not None
        why = self._cannot if self._cannot == SHUT_DOWN or not asks else ""
        self._is_bad(why or f"no answer within {in_units(LIMIT_S)}")

    def _heard(self, why: str) -> None:
        if why:
            self._is_bad(why)
        else:
            if self._last_is_good is not None:
                self._last_is_good = True
            self._await_answer()

    def _is_bad(self, why: str) -> None:
        generation = self._generation
        assert generation is not None
        self.stop()
        self._post(SettleFailed(generation.record.number, f"--settle-check: {why}"))

    # -- by HTTP -----------------------------------------------------------------

    def _send_asker(self, generation: OpenGeneration) -> None:
        """Raises OSError where it cannot be reached now."""
        way = self._reach(generation, self._asked.listener)
        if way is None:
            self._is_bad("there is one socket for it and the one before, so none can be asked")
            return
        self._opened.callback(way.close)

        def heard(why: str) -> None:
            if way.holds():
                self._heard(why)
            else:
                self._ask_anew(SHUT_DOWN)

        def ended(how: str) -> None:
            self._cannot = f"the process that asks {how}"

        self._asker = KeptAsker.repeating(self._loop, way, self._asked, heard, ended)
        self._opened.callback(self._asker.close)

    # -- by a command ------------------------------------------------------------

    def _run(self, generation: OpenGeneration) -> None:
        """Raises OSError or ValueError."""
        address = self._probes.address(generation)
        next_at = time.monotonic() + _EVERY_S

        def over(why: str) -> None:
            why = self._probes.judge(generation, why)
            if why == SHUT_DOWN:
                self._ask_anew(why)
                return
            self._opened.close()
            self._heard(why)
            if not why:
                self._loop.call_after(_NEXT, max(0.0, next_at - time.monotonic()), self._ask)

        command = CheckCommand(
            self._loop,
            generation.program,
            self._asked.path,
            {PROBE: address} if address else {},
            over=over,
            late=self._heard,
            limit_s=LIMIT_S,
            told=self._text(generation.record.number),
        )
        self._opened.callback(command.close)
        if self._cannot != SHUT_DOWN:  # else all of them together have as long as one
            self._loop.cancel(_LIMIT)  # it has its own

    def _text(self, number: int) -> bytes:
        """Return what it reads: of the generation that settles, and of the one that stands by."""
        counts = self._counts()
        others = (each for each in counts.values() if each["phase"] == "serving")
        return json.dumps({"new": counts.get(number), "old": next(others, None)}).encode()
