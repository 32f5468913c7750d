"""Where a command reaches the generation that it checks: what is said when that fails."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon import prober_client
from socketprotector.daemon.check_probe import CheckProbes
from socketprotector.daemon.delivery.probe_target import SHUT_DOWN
from socketprotector.system.loop import Loop


def test_that_nothing_forwards_what_a_check_sends_is_logged(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all that is seen is a check that fails, or hangs."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(prober_client, "Prober", fails)
    lines: list[tuple[str, str, dict[str, object]]] = []
    log = SimpleNamespace(write=lambda *words, **fields: lines.append((*words, fields)))
    way = SimpleNamespace(close=lambda: None, needs_forwarding=True)
    probes = CheckProbes(loop, cast("Any", log), lambda *_: cast("Any", way))
    generation = SimpleNamespace(record=SimpleNamespace(number=2), note_probe=lambda: None)

    assert probes.address(cast("Any", generation)).startswith("127.0.0.1:")

    why = "the prober cannot be started: no more processes"
    assert lines == [("warning", "check-unreachable", {"generation": 2, "reason": why})]
    probes.release_all()


def test_what_a_command_says_that_may_have_reached_another_generation_counts_for_nothing(
    loop: Loop,
) -> None:
    """The next one gets another address, by which what comes later is known to be of this one."""
    ways = [
        SimpleNamespace(address=("127.0.0.1", n), close=lambda: None, needs_forwarding=False)
        for n in (1, 2)
    ]
    ways[0].is_unchanged, ways[1].is_unchanged = (lambda: False), (lambda: True)
    left = iter(ways)
    probes = CheckProbes(loop, cast("Any", None), lambda *_: cast("Any", next(left)))
    generation = cast("Any", SimpleNamespace(record=SimpleNamespace(number=2)))

    assert probes.address(generation) == "127.0.0.1:1"
    assert probes.judge(generation, "") == SHUT_DOWN
    assert probes.address(generation) == "127.0.0.1:2"
    assert probes.judge(generation, "") == ""
    assert probes.judge(generation, "no") == "no"
    probes.release_all()
    assert probes.judge(generation, "") == ""
