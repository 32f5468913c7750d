"""--settle-check: probes the new generation during --settle, while a rollback is still possible.

A probe is an HTTP request (http_exchange.py) or a check command.  The command reads the counts of
the new and the old generation from stdin, as JSON.  It can also query the probe address, or the
operator's metrics.

`Settling` in verdicts.py decides when the generation fails.  After the time of --settle, the
generation keeps settling until one more good answer comes.

Probes also reach the generation during a hold, when new clients wait.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from ..core.events import SettleFailed
from ..model import probe_spec
from ..model.lazy_dataclass import replace
from ..model.probe_spec import ProbeSpec
from ..system.check_command import LIMIT_S
from . import verdicts
from .check_probe import CheckProbes
from .delivery.probe_target import Reach
from .generation import OpenGeneration
from .probe import Probe
from .runtime import Runtime
from .verdicts import Settling, Verdict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Counts = Callable[[], Mapping[int, Mapping[str, Any]]]

_EVERY_S = 1.0  # from the start of one check command to the next
_ANSWER_LIMIT_S = 5.0  # how long an HTTP answer may take
_TIMER = "settle-check"


class SettleCheck:
    """Carries out the actions CheckSettling and StopChecking (core/actions.py)."""

    def __init__(
        self, runtime: Runtime, reach: Reach, addresses: CheckProbes, counts: Counts
    ) -> None:
        """addresses: the probe addresses for check commands (check_probe.py).

        counts: returns the generations' counts, by number, for a command to read.
        """
        self._loop, self._post = runtime.loop, runtime.post
        self._addresses, self._counts = addresses, counts
        self._probe = Probe(runtime.loop, reach, addresses=addresses, input_of=self._input_of)
        self._generation: OpenGeneration | None = None
        self._spec = ProbeSpec("")
        self._began = self._sent_at = 0.0
        self._settling = Settling()

    def begin(self, generation: OpenGeneration) -> None:
        """Probe a generation until it fails, or until stop()."""
        self.stop()
        self._generation = generation
        self._spec = probe_spec.read_settle_check(generation.program.settle_check)
        self._settling = Settling()
        self.resume()

    def stop(self) -> None:
        self.suspend()
        self._generation = None

    def suspend(self) -> None:
        """Stop the probes; resume(), or the upgraded SocketProtector, starts them again."""
        self._loop.cancel(_TIMER)
        self._probe.end()
        if self._generation is not None:
            self._addresses.release(self._generation.record.number)

    def resume(self) -> None:
        """Start the probes, or restart them if an upgrade's exec has failed."""
        if self._generation is not None:
            self._settling = replace(self._settling, inconclusive_since=None)
            self._began = time.monotonic()
            self._send_probe()

    def note_settle_over(self, number: int) -> bool:
        """Record that a stage is over; return whether a good answer must still come.

        The first call of a stage discards the good answers so far.  The caller calls this method
        again until the result is False.  Also returns False if this generation is not checked.
        """
        generation = self._generation
        if generation is None or generation.record.number != number:
            return False
        settling = self._settling.after_settle_time()
        # A canary settles in two stages.  A good answer in the first does not count in the second.
        self._settling = replace(settling, is_over=not settling.is_good)
        return not settling.is_good

    @property
    def is_due(self) -> bool:
        """Return whether --settle is over, but a good answer must still come."""
        return (
            self._generation is not None and self._settling.is_over and not self._settling.is_good
        )

    # -- inside ------------------------------------------------------------------

    @property
    def _is_command(self) -> bool:
        return self._spec.kind == probe_spec.CHECK

    def _send_probe(self) -> None:
        assert self._generation is not None
        self._sent_at = time.monotonic()
        limit_s = LIMIT_S if self._is_command else _ANSWER_LIMIT_S
        self._probe.send(self._generation, self._spec, limit_s, self._on_verdict)

    def _on_verdict(self, verdict: Verdict) -> None:
        generation, now = self._generation, time.monotonic()
        assert generation is not None
        if verdict.kind == verdicts.GOOD and not self._is_command:
            generation.note_probe()  # check_probe.py notes each connection of a command
        self._settling = self._settling.after(verdict, self._sent_at, now)
        if self._settling.bad:
            self.stop()
            reason = f"--settle-check: {self._settling.bad}"
            self._post(SettleFailed(generation.record.number, reason))
            return
        next_s = max(0.0, self._sent_at + _EVERY_S - now)
        usual_s = next_s if self._is_command else verdicts.pause_s(now - self._began)
        self._loop.call_after(_TIMER, self._settling.pause_s(usual_s), self._send_probe)

    def _input_of(self, number: int) -> bytes:
        """Return the counts of the new and the old generation, for a check command's stdin."""
        counts = self._counts()
        serving = (each for each in counts.values() if each["phase"] == "serving")
        return json.dumps({"new": counts.get(number), "old": next(serving, None)}).encode()
