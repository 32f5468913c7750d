"""Probes a starting generation under --ready accept, http: and https:, and without --ready.

The generation gets no clients yet.  In listener mode a mark on the probe's connection selects the
generation (system/reuseport.py); a probe of a UNIX socket connects to the generation's own socket.
In other modes the probe connects to a loopback port, and connections to this port go into the
generation's channel.

Without --ready, probes are sent only in listener mode.  Such a probe can fail although the
generation is ready (_MAYBE_READY of verdicts.py).  Then a timer can make the generation
ready (system/readiness.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..model import probe_spec
from ..model.probe_spec import ProbeSpec
from . import verdicts
from .delivery.probe_target import Reach
from .generation import OpenGeneration
from .probe import Probe
from .runtime import Runtime
from .verdicts import Verdict

_TIMER = "ready-probe"
#: How long an accept probe waits for a worker; the next probe continues with the same connection.
_ACCEPTED_S = 1.0
_ANSWERED_S = 5.0  # how long an HTTP answer may take


class ReadyProbe:
    """Carries out the actions Probe and StopProbing (core/actions.py)."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        reach: Reach,
        answered: Callable[[int, str], bool],
        inconclusive: Callable[[int], None],
    ) -> None:
        """answered: called after a good answer, with the generation's number and the kind of probe.

        answered returns False if the generation must be probed again.
        inconclusive: called with the generation's number after a verdict that lets a timer make the
        generation ready (time_tells() of verdicts.py).
        """
        self._loop, self._log = runtime.loop, runtime.log
        self._answered, self._inconclusive = answered, inconclusive
        self._generation: OpenGeneration | None = None
        self._spec = ProbeSpec("")
        self._probe = Probe(runtime.loop, reach)
        self._began = 0.0
        #: Why the generation is not ready, according to the last probe.
        self.last = ""

    def begin(self, generation: OpenGeneration) -> None:
        """Probe a generation until it answers, or until stop()."""
        self.stop()
        program = generation.program
        if program.ready == "any" and program.ready_fd >= 0:
            return  # without --ready, but the command reports readiness by {fd:ready}
        self._generation, self._began = generation, time.monotonic()
        self._spec = probe_spec.read(program.ready_question or "accept")
        self.last = f"GET {self._spec.path}: not answered yet" if self._spec.by_http else ""
        self._send_probe()

    def stop(self) -> None:
        """Stop the probes."""
        self.suspend()
        self._generation, self.last = None, ""

    def suspend(self) -> None:
        """Stop the probes; resume(), or the next program after an upgrade, starts them again."""
        self._loop.cancel(_TIMER)
        self._probe.end()

    def resume(self) -> None:
        """Restart the probes after a failed exec."""
        if self._generation is not None:
            self._send_probe()

    # -- inside ------------------------------------------------------------------

    def _send_probe(self) -> None:
        assert self._generation is not None
        limit_s = _ANSWERED_S if self._spec.by_http else _ACCEPTED_S
        self._probe.send(self._generation, self._spec, limit_s, self._on_verdict)

    def _send_later(self) -> None:
        pause_s = verdicts.pause_s(time.monotonic() - self._began)
        self._loop.call_after(_TIMER, pause_s, self._send_probe)

    def _on_verdict(self, verdict: Verdict) -> None:
        generation = self._generation
        assert generation is not None
        number = generation.record.number
        if verdict.kind == verdicts.GOOD:
            done = self._answered(number, self._spec.kind)
            if self._generation is not generation:
                return  # the answer let another reload begin: we now probe that reload's generation
            if done:
                self.stop()
            else:
                self._send_later()
            return
        cannot = verdict.kind in (verdicts.CANNOT, verdicts.NO_TARGET)
        why = f"cannot be probed: {verdict.why}" if cannot else verdict.why
        waits = verdict.kind in (verdicts.UNMADE, verdicts.UNTAKEN) and not self._spec.by_http
        if why != self.last and not waits:  # an accept probe that still waits has not failed
            self._log.write("info", "probe-failed", generation=number, reason=why)
        self.last = why
        if verdict.kind != verdicts.NO_TARGET:
            self._send_later()
        timer_may_tell = verdicts.time_tells(generation.program.ready, verdict)
        if timer_may_tell and not self._probe.target_is_closed:
            self._inconclusive(number)
