"""The fake protector's answers have the fields of a real one's, with values of the same types."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from socketprotector.ctl.client import Client
from tests.running import DEADLINE_S, Protector, ask, eventually
from tests.scenarios.tools import library_worker
from tests.unit.ctl import fake


def kind(value: object) -> str:
    """The JSON type."""
    for types, name in ((bool, "bool"), (int | float, "number"), (str, "text")):
        if isinstance(value, types):
            return name
    return type(value).__name__


def differences(real: Any, made: Any, at: str = "") -> list[str]:
    """Say where two answers have other fields or types; null goes with any type."""
    if real is None or made is None:
        return []
    if kind(real) != kind(made):
        return [f"{at}: {kind(real)}, and {kind(made)} in the fake"]
    if isinstance(real, list):
        return differences(real[0], made[0], f"{at}[]") if real and made else []
    if not isinstance(real, dict):
        return []
    found = [f"{at}.{name}: only in one of them" for name in sorted(real.keys() ^ made.keys())]
    for name in real.keys() & made.keys():
        found += differences(real[name], made[name], f"{at}.{name}")
    return found


def test_the_fake_answers_as_a_real_protector(
    protector: Callable[..., Protector], tmp_path: Path
) -> None:
    control = tmp_path / "control"
    daemon = protector("--control", control, "127.0.0.1:0", "--", *library_worker("echo")).ready()
    ask(("127.0.0.1", daemon.port))
    with Client(str(control), DEADLINE_S) as client:

        def status() -> dict[str, Any]:
            return client.request("status")

        os.kill(status()["generations"][0]["workers"][0]["pid"], signal.SIGKILL)
        eventually(lambda: status()["crashes"] == 1, "the crash")
        daemon.reload()
        eventually(lambda: len(status()["generations"]) == 1, "the new generation alone")
        client.request("reload", dry_run=True)
        eventually(lambda: status()["dry_run"]["result"] == "passed", "the dry run")
        eventually(lambda: len(status()["generations"]) == 1, "the end of what was tried")

        real = status()
        answer = client.request("crashes")
        history = client.request("history")["history"]
        workers = client.request("connections")["workers"]

    made = fake.status(reloads=[fake.reload(8, "reloaded")], dry_run=fake.reload(9, "passed"))
    crashes, last_words_hint = answer["crashes"], answer["last_words_hint"]
    entries = [fake.entry("reload", 2, "reloaded"), fake.entry("dry-run", 3, "passed")]
    owners = [fake.owner(4712, accepted_at_by_fd={})]
    assert differences(real, made) == []
    assert differences(crashes, [fake.crash()], "crashes") == []
    assert differences(history, entries, "history") == []
    assert [each["kind"] for each in history] == ["reload", "dry-run"]
    assert differences(workers, owners, "connections") == []
    # Else nothing would have been compared.
    assert real["reloads"]
    assert crashes
    assert last_words_hint is None  # the relay keeps them
    assert workers[0]["accepted_at_by_fd"] == {}
    assert real["generations"][0]["workers"][0]["accepted"] is not None
    assert differences({"a": 1, "b": ""}, {"a": "", "c": ""}) != []
    daemon.stop()
