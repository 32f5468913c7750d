"""Commands with a verdict against a fake protector: what they call a success."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from socketprotector.ctl import operation
from socketprotector.ctl.client import Client
from tests.running import Ended
from tests.unit.ctl.conftest import run_into
from tests.unit.ctl.fake import Connection, Fake, Message, Refusing

Ctl = Callable[..., Ended]


def releases(**fields: Any) -> Message:
    """The field `releases` of a status: release 1 serves."""
    found = {"deploying": None, "generation": 1, "serving": "1", "current": "1"}
    return {**found, "link": "/srv/current", "saved": True, "error": None, **fields}


@pytest.fixture
def web(fake: Fake) -> Fake:
    """A protector with release 1."""
    fake.status["releases"] = releases()
    listed = [{"release": "1", "serving": True, "current": True, "changed": False}]
    fake.answers["releases"] = lambda *_: {"releases": listed}
    return fake


def refuse(_: Connection, asked: Message) -> Message:
    raise Refusing("deploying", "a deploy of 2 is in progress (generation 2)")


def cut_first(web: Fake, then: Callable[[], object] = lambda: None) -> None:
    """Cut the connection at the first deploy, after `then`; refuse the second."""

    def answer(connection: Connection, asked: Message) -> Message | None:
        if web.commands().count("deploy") > 1:
            return refuse(connection, asked)
        then()
        connection.cut()
        return None

    web.answers["deploy"] = answer


def test_a_release_that_another_is_replacing_is_not_unchanged(web: Fake, ctl: Ctl) -> None:
    web.answers["deploy"] = refuse
    assert ctl("deploy", "1", "--if-changed").out == "unchanged: release 1 is serving\n"

    web.status["releases"] = releases(deploying="2", generation=2)

    refused = ctl("deploy", "1", "--if-changed")
    assert refused.status == 6
    assert "a deploy of 2 is in progress" in refused.err


def test_an_unchanged_release_that_is_not_on_disk_is_no_success(web: Fake, ctl: Ctl) -> None:
    web.status["releases"] = releases(saved=False, error="cannot write: No space left on device")

    found = ctl("deploy", "1", "--if-changed", "--json")

    assert found.status == 5
    outcome = json.loads(found.out)
    assert outcome["result"] == "not recorded"
    assert "No space left on device" in outcome["reason"]
    for word in ("--no-wait", "--dry-run"):  # these record nothing
        assert ctl("deploy", "1", "--if-changed", word).status == 0

    web.status["releases"] = releases(error="cannot lock /srv/current.lock: Permission denied")

    assert ctl("deploy", "1", "--if-changed").status == 0, "link and history are on disk"


def test_a_release_on_disk_is_a_success_although_events_come_all_the_time(
    web: Fake, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when hundreds of old workers exit after the switch, one after another."""
    monkeypatch.setattr(operation, "_STATUS_EVERY_S", 0.05)
    web.status["releases"] = releases(saved=False)
    came = 0

    def next_event(*_: object) -> Message:
        nonlocal came
        came += 1
        assert came < 1000, "no status was requested"
        time.sleep(0.001)
        web.status["releases"] = releases()
        return {"event": "exited", "generation": 0}

    monkeypatch.setattr(Client, "event", next_event)

    assert ctl("deploy", "1", "--if-changed").status == 0


def test_a_cut_dry_run_takes_no_deploy_that_succeeded_for_its_own(web: Fake, ctl: Ctl) -> None:
    cut_first(web, lambda: web.status.update(releases=releases(serving="2", current="2")))

    assert ctl("deploy", "2", "--dry-run", "--no-wait").status == 6


def test_a_dry_run_without_a_wait_is_not_called_a_deploy(web: Fake, ctl: Ctl) -> None:
    """`releases` shows no dry run; `status` does."""
    web.answers["deploy"] = lambda *_: {"generation": 2, "release": "2"}

    said = ctl("deploy", "2", "--dry-run", "--no-wait").out
    assert said.startswith("dry run requested: generation 2 will try release 2; see `socketprot")
    assert said.endswith("status`\n")
    assert "generation 2 will run release 2" in ctl("deploy", "2", "--no-wait").out


@pytest.mark.parametrize("words", [["ready", "--json"], ["diff"], ["diff", "--json"]])
def test_a_verdict_is_the_exit_status_though_its_reader_is_gone(
    words: list[str], web: Fake
) -> None:
    web.status["phase"] = "stopping"
    web.answers["diff"] = lambda *_: {"changes": ["a", "b"], "needs_restart": ["a"]}

    assert run_into("gone", *words).status == 3


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_cut_deploy_takes_only_one_of_its_kind_for_its_own(
    dry_run: bool, web: Fake, ctl: Ctl
) -> None:
    """The connection is cut before the answer; meanwhile somebody else tries the release."""
    cut_first(
        web,
        lambda: web.status.update(
            releases=releases(deploying="2", generation=2),
            dry_run=None if dry_run else {"generation": 2, "result": "running"},
        ),
    )

    found = ctl("deploy", "2", "--no-wait", *(["--dry-run"] if dry_run else []))

    assert found.status == 6, found
    assert web.commands().count("deploy") == 2


def test_a_cut_deploy_does_not_take_an_earlier_one_of_its_release_for_its_own(
    web: Fake, ctl: Ctl
) -> None:
    web.status["releases"] = releases(deploying="2", generation=2)
    cut_first(web)

    assert ctl("deploy", "2", "--no-wait").status == 6


@pytest.mark.parametrize("fields", [{"route": None, "phase": "waiting"}, {"phase": "stopping"}])
def test_a_release_that_does_not_serve_or_stops_is_not_unchanged(
    fields: Message, web: Fake, ctl: Ctl
) -> None:
    web.answers["deploy"] = refuse
    web.status.update(fields)

    assert ctl("deploy", "1", "--if-changed").status == 6


def test_a_cut_reload_does_not_take_an_earlier_one_for_its_own(web: Fake, ctl: Ctl) -> None:
    """The earlier one was reading its file, so that the status had no number of it yet."""

    def cut(connection: Connection, asked: Message) -> Message | None:
        if web.commands().count("reload") > 1:
            return {"generation": 3}
        web.status["reloads"] = [*web.status["reloads"], {"generation": 2, "result": "reloaded"}]
        connection.cut()
        return None

    web.status["phase"] = "reloading"
    web.answers["reload"] = cut

    assert "generation 3 will" in ctl("reload", "--no-wait").out
