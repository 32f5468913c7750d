"""The probe of a starting generation, and what its answer begins: no socket, no process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon import ready_probe, verdicts
from socketprotector.daemon.effects import Effects
from socketprotector.daemon.ready_probe import ReadyProbe
from socketprotector.daemon.verdicts import Verdict
from tests.unit.daemon.clock import Clock


class Sender:
    """Stands for Probe: notes the generation that is being probed."""

    def __init__(self, *_: object) -> None:
        self.number = 0
        self.verdict: Any = None

    def send(self, generation: Any, _spec: object, _limit_s: float, done: Any) -> None:
        self.number, self.verdict = generation.record.number, done

    def end(self) -> None:
        self.number = 0


def generation(number: int) -> Any:
    program = SimpleNamespace(ready="accept", ready_fd=-1, ready_question="accept")
    return SimpleNamespace(record=SimpleNamespace(number=number), program=program)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("ends", ["waiting reload", "stop", ""])
def test_the_answer_may_begin_the_probes_of_a_reload_that_has_waited(
    monkeypatch: pytest.MonkeyPatch, ends: str, done: bool
) -> None:
    """A decision follows at once, which ends these probes and may begin others."""
    monkeypatch.setattr(ready_probe, "Probe", Sender)
    clock = Clock()
    runtime = clock.use_in(monkeypatch, ready_probe)

    def answered(number: int, kind: str) -> bool:
        assert (number, kind) == (1, "accept")
        if ends:
            probe.stop()
        if ends == "waiting reload":
            probe.begin(generation(2))
        return done

    probe = ReadyProbe(runtime, reach=cast("Any", None), answered=answered, inconclusive=print)
    sent = cast("Any", probe)._probe
    probe.begin(generation(1))
    assert sent.number == 1
    sent.verdict(Verdict(verdicts.GOOD))

    clock.pass_time(60)
    expected = {"waiting reload": 2, "stop": 0, "": 0 if done else 1}
    assert sent.number == expected[ends]


@pytest.mark.parametrize(
    ("kind", "advised"), [(verdicts.BAD, "why"), (verdicts.REFUSED, "why; use the socket")]
)
def test_who_has_answered_badly_is_not_advised_to_accept(
    monkeypatch: pytest.MonkeyPatch, kind: str, advised: str
) -> None:
    monkeypatch.setattr(ready_probe, "Probe", Sender)
    runtime = Clock().use_in(monkeypatch, ready_probe)
    started = generation(1)
    started.program.ready_question = "http:/"
    unready: Any = {"answered": lambda *_: True, "inconclusive": print}
    probe = ReadyProbe(runtime, reach=cast("Any", None), **unready)
    sent = cast("Any", probe)._probe
    sent.target_may_refuse_clients = False
    pool = SimpleNamespace(proved_ready=False, advice=lambda *_, **__: "use the socket")

    probe.begin(started)
    sent.verdict(Verdict(kind, "why"))

    effects = SimpleNamespace(probing=probe, pool=pool)
    assert Effects._start_advice(cast("Any", effects), 1) == advised
    probe.begin(started)
    assert not probe.was_accepted
