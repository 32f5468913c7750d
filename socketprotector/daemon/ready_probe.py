"""Probes a starting generation if --ready is accept, http: or https:, or is not set.

The generation gets no clients yet, so a probe cannot reach it as clients do.  Under --handoff
listener over TCP, a mark on the probe's connection selects the generation's socket
(`ProbeTarget.mark`).  At a UNIX path each generation has its own socket, so the probe needs no
mark.  Under other values of --handoff the probe connects to a loopback port, and the protector
sends the port's connections into the generation's channel.

Without --ready, probes are sent only under --handoff listener.  Such a probe can fail although the
workers can already serve (_MAYBE_READY of verdicts.py).  The generation then counts as ready when a
timer ends (system/readiness.py).  Exception: if an option of the probed socket may keep clients out
(ProbeTarget.may_refuse_clients), the timer does not start.
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
#: How long an accept probe waits for a worker.  The next probe then reuses the connection.
_ACCEPT_LIMIT_S = 1.0
_ANSWER_LIMIT_S = 5.0  # how long an HTTP answer may take


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

        `answered` returns False if the generation must be probed again.
        inconclusive: called with the generation's number if a timer may make the generation ready
        (timer_may_decide() of verdicts.py, ProbeTarget.may_refuse_clients).
        """
        self._loop, self._log = runtime.loop, runtime.log
        self._answered, self._inconclusive = answered, inconclusive
        self._generation: OpenGeneration | None = None
        self._spec = ProbeSpec("")
        self._probe = Probe(runtime.loop, reach)
        self._began = 0.0
        #: Why the generation is not ready, according to the last probe.
        self.why_not_ready = ""
        #: Whether the last HTTP probe reached a worker, which gave a bad answer or none in time.
        self.was_accepted = False

    def begin(self, generation: OpenGeneration) -> None:
        """Probe until `answered` returns True, until the verdict NO_TARGET, or until stop().

        Exception: without --ready, a generation with {fd:ready} in COMMAND or --env is not probed.
        """
        self.stop()
        program = generation.program
        if program.ready == "any" and program.ready_fd >= 0:
            return  # the workers report readiness by {fd:ready}, so they need no probe
        self._generation, self._began = generation, time.monotonic()
        self._spec = probe_spec.read(program.ready_question or "accept")
        by_http, path = self._spec.by_http, self._spec.path
        self.why_not_ready = f"GET {path}: not answered yet" if by_http else ""
        self._send_probe()

    def stop(self) -> None:
        self.suspend()
        self._generation, self.why_not_ready, self.was_accepted = None, "", False

    def suspend(self) -> None:
        """Stop the probes; resume(), or the upgraded SocketProtector, starts them again."""
        self._loop.cancel(_TIMER)
        self._probe.end()

    def resume(self) -> None:
        """Restart the probes after a failed exec."""
        if self._generation is not None:
            self._send_probe()

    # -- inside ------------------------------------------------------------------

    def _send_probe(self) -> None:
        assert self._generation is not None
        limit_s = _ANSWER_LIMIT_S if self._spec.by_http else _ACCEPT_LIMIT_S
        self._probe.send(self._generation, self._spec, limit_s, self._on_verdict)

    def _send_later(self) -> None:
        pause_s = verdicts.pause_s(time.monotonic() - self._began)
        self._loop.call_after(_TIMER, pause_s, self._send_probe)

    def _on_verdict(self, verdict: Verdict) -> None:
        generation = self._generation
        assert generation is not None
        number = generation.record.number
        if verdict.kind == verdicts.GOOD:
            is_done = self._answered(number, self._spec.kind)
            if self._generation is not generation:
                return  # answered() has stopped this probe, and perhaps begun another
            if is_done:
                self.stop()
            else:
                self._send_later()
            return
        cannot = verdict.kind in (verdicts.CANNOT, verdicts.NO_TARGET)
        why = f"cannot be probed: {verdict.why}" if cannot else verdict.why
        waits = verdict.kind in (verdicts.UNMADE, verdicts.UNTAKEN) and not self._spec.by_http
        if why != self.why_not_ready and not waits:  # an accept probe that waits has not failed
            self._log.write("info", "probe-failed", generation=number, reason=why)
        self.why_not_ready, self.was_accepted = why, verdict.kind == verdicts.BAD
        if verdict.kind != verdicts.NO_TARGET:
            self._send_later()
        timer_may_decide = verdicts.timer_may_decide(generation.program.ready, verdict)
        if timer_may_decide and not self._probe.target_may_refuse_clients:
            self._inconclusive(number)
