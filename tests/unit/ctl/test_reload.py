"""reload: the exit status is what became of it, whatever happens to the connection."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from socketprotector.ctl import client
from socketprotector.ctl.reload_progress import Reload, WaitsShown
from tests import forked
from tests.running import DEADLINE_S, Ended, Lines, eventually
from tests.together import together
from tests.unit.ctl.conftest import COMMAND, run_into
from tests.unit.ctl.fake import (
    Connection,
    Fake,
    Message,
    Refusing,
    crash,
    generation,
    reload,
    status,
    worker,
)

Ctl = Callable[..., Ended]


def reloading(fake: Fake, then: Callable[[Connection], None], promised: int = 9) -> None:
    """Answer `reload`, and do `then` right afterwards, as the protector's loop does."""

    def answer(connection: Connection, asked: Message) -> None:
        connection.send({"v": 1, "id": asked["id"], "ok": True, "result": {"generation": promised}})
        then(connection)

    fake.answers["reload"] = answer


def test_it_waits_until_the_new_generation_serves_and_shows_the_way(fake: Fake, ctl: Ctl) -> None:
    fake.status["workers_wanted"] = 2

    def then(connection: Connection) -> None:
        connection.event("reloading")
        connection.event("spawned", generation=9, worker=15, pid=1)
        connection.event("spawned", generation=9, worker=16, pid=2)
        connection.event("worker-ready", generation=9, worker=15)
        connection.event("worker-ready", generation=9, worker=16)
        connection.event("route", generation=9)
        connection.event("reloaded", generation=9)

    reloading(fake, then)

    said = ctl("reload")

    assert said == Ended(
        0,
        "reloaded: generation 9 is serving in place of generation 8\n",
        "generation 9 is starting\nready 1/2\nready 2/2\n"
        "switched: new connections go to generation 9\n",
    )


def test_a_configuration_that_wants_more_workers_counts_to_the_new_number(
    fake: Fake, ctl: Ctl
) -> None:
    fake.status["workers_wanted"] = 1

    def then(connection: Connection) -> None:
        for slot in range(3):
            connection.event("spawned", generation=9, worker=15 + slot, pid=1, slot=slot)
        connection.event("worker-ready", generation=9, worker=15)
        connection.event("worker-ready", generation=9, worker=16)
        connection.event("worker-ready", generation=9, worker=17)
        connection.event("reloaded", generation=9)

    reloading(fake, then)

    assert "ready 1/3\nready 2/3\nready 3/3\n" in ctl("reload").err


def test_of_many_workers_each_tenth_part_is_a_line(fake: Fake, ctl: Ctl) -> None:
    fake.status["workers_wanted"] = 128

    def then(connection: Connection) -> None:
        for number in range(128):
            connection.event("worker-ready", generation=9, worker=15 + number)
        connection.event("route", generation=9)
        fake.status["generations"] = [
            generation(9),
            generation(8, "draining", *(worker(each) for each in range(128)), active=0),
        ]
        connection.event("reloaded", generation=9)
        threading.Timer(0.3, gone, [connection]).start()

    def gone(connection: Connection) -> None:
        """Each is seen to have gone: status is asked for after each event."""
        fake.answers["status"] = looked
        connection.event("exited", generation=8)

    def looked(connection: Connection, asked: Message) -> None:
        connection.send({"v": 1, "id": asked["id"], "ok": True, "result": fake.status})
        workers = fake.status["generations"][-1]["workers"]
        if len(fake.status["generations"]) == 2:
            workers.pop()
            if not workers:
                fake.status["generations"].pop()
            connection.event("exited", generation=8)

    reloading(fake, then)

    said = ctl("reload", "--drained")

    assert said.status == 0
    lines = said.err.splitlines()
    ready = [line for line in lines if line.startswith("ready ")]
    drained = [line for line in lines if line.startswith("drained ")]
    assert (ready[0], ready[-1], len(ready)) == ("ready 1/128", "ready 128/128", 11)
    assert drained[0] == "drained 0/128 workers"
    assert (drained[-1], len(drained)) == ("drained 128/128 workers", 11)


def test_a_release_that_is_given_up_is_status_3_with_the_reason_and_the_last_words(
    fake: Fake, ctl: Ctl
) -> None:
    def then(connection: Connection) -> None:
        connection.event(
            "reload-failed",
            generation=9,
            reason="worker 15 exited with status 1",
            last_words="Traceback\n\x1b[2JImportError: app",
        )

    reloading(fake, then)

    said = ctl("reload", "--wait")

    assert said.status == 3
    assert said.out == ""
    assert said.err == (
        "socketprotectorctl: not reloaded: generation 9 failed: worker 15 exited with "
        "status 1; generation 8 is still serving\n  | Traceback\n  | \\x1b[2JImportError: app\n"
    )


# -- a dry run -------------------------------------------------------------------------


def test_a_dry_run_that_passes_is_status_0_once_what_was_tried_is_gone(
    fake: Fake, ctl: Ctl
) -> None:
    def then(connection: Connection) -> None:
        connection.event("dry-run", generation=9)
        connection.event("spawned", generation=9, worker=15, pid=1)
        connection.event("worker-ready", generation=9, worker=15)
        fake.status["generations"].append(generation(9, "abandoned", worker(15)))
        connection.event("dry-run-passed", generation=9)
        threading.Timer(0.3, gone, [connection]).start()

    def gone(connection: Connection) -> None:
        del fake.status["generations"][-1]
        connection.event("drained", generation=9)

    reloading(fake, then)

    assert ctl("reload", "--dry-run") == Ended(
        0,
        "would reload: generation 9 became ready and was stopped; generation 8 is still serving\n",
        "generation 9 is starting\nready 1/1\n",
    )
    assert {"command": "reload", "dry_run": True} in fake.asked
    assert len(fake.status["generations"]) == 1


def test_one_that_fails_is_status_3_as_its_reload_would_be(fake: Fake, ctl: Ctl) -> None:
    def then(connection: Connection) -> None:
        connection.event("reload-failed", generation=9, reason="not this")
        connection.event(
            "dry-run-failed", generation=9, reason="exited with status 1", last_words="no database"
        )

    reloading(fake, then)

    said = ctl("reload", "--dry-run")

    assert (said.status, said.out) == (3, "")
    assert said.err == (
        "socketprotectorctl: not ready to reload: generation 9 failed: exited with status 1; "
        "generation 8 is still serving\n  | no database\n"
    )


@pytest.mark.parametrize(("result", "status"), [("passed", 0), ("failed", 3)])
def test_its_verdict_is_in_the_status_after_an_upgrade(
    fake: Fake, ctl: Ctl, result: str, status: int
) -> None:
    def then(connection: Connection) -> None:
        fake.status["dry_run"] = reload(9, result, "no" if status else "")
        fake.status["reloads"] = [reload(10, "reloaded")]  # another one, meanwhile
        connection.cut()

    reloading(fake, then)

    assert ctl("reload", "--dry-run").status == status


def test_its_last_words_are_in_that_too(fake: Fake, ctl: Ctl) -> None:
    def then(connection: Connection) -> None:
        reason = "exited with status 1; its last words:\nno database"
        fake.status["dry_run"] = reload(9, "failed", reason)
        connection.cut()

    reloading(fake, then)

    assert ctl("reload", "--dry-run").err.endswith(
        "not ready to reload: generation 9 failed: exited with status 1; "
        "generation 8 is still serving\n"
        "  | no database\n"
    )


@pytest.mark.parametrize(("result", "status"), [("passed", 0), ("failed", 3)])
@pytest.mark.parametrize("early", [True, False])
def test_a_stop_after_its_verdict_ends_what_was_tried_too(
    fake: Fake, ctl: Ctl, result: str, status: int, early: bool
) -> None:
    """And is not waited for as a crash is, after which another protector comes."""

    def then(connection: Connection) -> None:
        fake.status["generations"].append(generation(9, "abandoned", worker(15)))
        if early:
            connection.event("stopping")
        connection.event(f"dry-run-{result}", generation=9, reason="called off")
        if not early:
            connection.event("stopping")
        threading.Thread(target=fake.end).start()

    reloading(fake, then)
    began = time.monotonic()

    said = ctl("reload", "--dry-run")

    assert said.status == status, said
    assert "still serving" not in said.out + said.err
    assert time.monotonic() - began < client.RETURN_S


def test_one_that_was_heard_is_not_requested_twice(fake: Fake, ctl: Ctl) -> None:
    def heard(connection: Connection, asked: Message) -> None:
        fake.status["dry_run"] = reload(9, "passed")
        connection.cut()

    fake.answers["reload"] = heard

    assert ctl("reload", "--dry-run").status == 0
    assert fake.commands().count("reload") == 1


def test_what_became_of_an_earlier_reload_is_no_verdict(fake: Fake, ctl: Ctl) -> None:
    fake.status = status(
        generation(8, "serving", worker(14)), generation(9, "starting"), phase="reloading"
    )

    def then(connection: Connection) -> None:
        connection.event("reload-failed", generation=9, reason="not this one")
        connection.event("recovered", generation=10)
        connection.event("reloaded", generation=11)

    reloading(fake, then, promised=10)

    said = ctl("reload")

    assert (said.status, said.out) == (
        0,
        "reloaded: generation 11 is serving in place of generation 8\n",
    )
    assert "an earlier reload is still in progress" in said.err


@pytest.mark.parametrize(("earlier", "old"), [("reloaded", 9), ("reload-failed", 8)])
def test_it_names_the_generation_that_an_earlier_reload_has_left(
    fake: Fake, ctl: Ctl, earlier: str, old: int
) -> None:
    """The earlier reload settles when this one is requested, so generation 9 has the clients."""
    fake.status = status(
        generation(8, "serving", worker(14)), generation(9, "settling"), phase="settling", route=9
    )

    def then(connection: Connection) -> None:
        if earlier == "reload-failed":
            connection.event("route", generation=8)
        connection.event(earlier, generation=9)
        connection.event("route", generation=old, sharing=10, share="50%")
        connection.event("route", generation=10)
        connection.event("reloaded", generation=10)

    reloading(fake, then, promised=10)

    said = ctl("reload", "--json")

    assert (said.status, json.loads(said.out)["from"]) == (0, old)


def test_an_upgrade_in_the_middle_only_means_to_look_into_status(fake: Fake, ctl: Ctl) -> None:
    def then(connection: Connection) -> None:
        fake.status["reloads"] = [reload(9, "reloaded")]
        connection.cut()

    reloading(fake, then)

    said = ctl("reload")

    assert (said.status, said.out) == (
        0,
        "reloaded: generation 9 is serving in place of generation 8\n",
    )
    assert "connecting again" in said.err


def test_a_crash_in_the_middle_does_not_make_a_failure_a_success(fake: Fake, ctl: Ctl) -> None:
    def then(connection: Connection) -> None:
        fake.status["reloads"] = [reload(9, "failed", "not ready within 1s")]
        crashes = [crash(generation=9, last_words="no database\n")]
        fake.answers["crashes"] = lambda *_: {"crashes": crashes}
        connection.cut()

    reloading(fake, then)

    said = ctl("reload")

    assert said.status == 3
    assert (
        "failed: not ready within 1s; generation 8 is still serving\n  | no database\n" in said.err
    )


def test_a_rescue_that_serves_after_the_failure_is_not_still_serving(fake: Fake, ctl: Ctl) -> None:
    def then(connection: Connection) -> None:
        fake.status["reloads"] = [reload(9, "failed", "exited with status 1")]
        fake.status["route"] = 10
        fake.answers["crashes"] = lambda *_: {"crashes": []}
        connection.cut()

    reloading(fake, then)

    said = ctl("reload")

    assert said.status == 3
    assert "failed: exited with status 1; generation 10 is serving\n" in said.err


def test_a_request_that_was_cut_off_is_asked_again_unless_it_was_heard(
    fake: Fake, ctl: Ctl
) -> None:
    for heard in (True, False):
        asked: list[Message] = []

        def answer(
            connection: Connection, message: Message, asked: list[Any] = asked, heard: bool = heard
        ) -> Message | None:
            asked.append(message)
            if len(asked) == 1:
                fake.status["reloads"] = [reload(8, "reloaded")]
                if heard:
                    fake.status["reloads"].append(reload(9, "running"))
                connection.cut()
                return None
            fake.status["reloads"].append(reload(9, "reloaded"))
            return {"generation": 9}

        fake.status["reloads"] = [reload(8, "reloaded")]
        fake.answers["reload"] = answer
        if heard:
            threading.Timer(
                0.5, lambda: fake.status["reloads"].append(reload(9, "reloaded"))
            ).start()

        assert ctl("reload").status == 0
        assert len(asked) == (1 if heard else 2)


def test_a_protector_that_does_not_come_back_is_status_1(
    fake: Fake, ctl: Ctl, monkeypatch: Any
) -> None:
    monkeypatch.setattr("socketprotector.ctl.client.RETURN_S", 0.2)
    reloading(fake, lambda _: threading.Thread(target=fake.end).start())

    said = ctl("reload")

    assert said.status == 1
    assert (
        "lost sight of generation 9 before it was serving: the protector did not come back"
        in said.err
    )


@pytest.mark.parametrize("result", ["reloaded", "failed", ""])
def test_the_verdict_of_a_protector_that_was_started_since_is_not_ours(
    fake: Fake, ctl: Ctl, result: str
) -> None:
    def then(connection: Connection) -> None:
        fake.status["started_at"] += 60.0
        fake.status["reloads"] = [reload(9, result)] if result else []
        connection.cut()

    reloading(fake, then)

    said = ctl("reload", "--json")

    assert said.status == 1
    assert json.loads(said.out)["result"] == "lost"
    assert (
        "lost sight of generation 9 before it was serving: the protector has ended, and another "
        "one was started; see" in said.err
    )


def test_a_reload_is_not_requested_of_a_protector_that_was_started_since(
    fake: Fake, ctl: Ctl
) -> None:
    asked = []

    def answer(connection: Connection, message: Message) -> None:
        asked.append(message)
        fake.status["started_at"] += 60.0
        connection.cut()

    fake.answers["reload"] = answer

    said = ctl("reload")

    assert said.status == 1
    assert "the protector has ended, and another one was started" in said.err
    assert len(asked) == 1


def test_a_stop_in_the_middle_is_status_1(fake: Fake, ctl: Ctl) -> None:
    def then(connection: Connection) -> None:
        connection.event("stopping")
        fake.status["phase"] = "stopping"
        threading.Thread(target=fake.end).start()

    reloading(fake, then)
    began = time.monotonic()

    said = ctl("reload")

    assert said.status == 1
    assert "lost sight of generation 9 before it was serving: the protector was stopped" in said.err
    assert time.monotonic() - began < client.RETURN_S


REASON = "before --settle was over: the protector is stopping"


@pytest.mark.parametrize("more", [(), ("--drained",)], ids=["", "drained"])
@pytest.mark.parametrize("good", [True, False])
def test_the_verdict_that_a_stop_brings_forward_is_the_outcome(
    fake: Fake, ctl: Ctl, good: bool, more: tuple[str, ...]
) -> None:
    """Also where the protector has ended before anything else can be asked."""

    def then(connection: Connection) -> None:
        connection.event("stopping")
        fake.status["phase"] = "stopping"
        name, reason = ("reloaded", REASON) if good else ("reload-failed", "called off")
        connection.event(name, generation=9, reason=reason)
        fake.status["generations"] = [generation(9), generation(8, "draining", worker(14, 77))]
        threading.Thread(target=fake.end).start()

    reloading(fake, then)
    began = time.monotonic()

    said = ctl("reload", "--json", *more)

    told = json.loads(said.out)
    assert (said.status, told["result"]) == ((0, "reloaded") if good else (3, "failed"))
    assert told["reason"] == (REASON if good else "called off")
    assert time.monotonic() - began < client.RETURN_S


def test_a_timeout_is_status_4_and_says_what_is_waited_for(fake: Fake, ctl: Ctl) -> None:
    def then(connection: Connection) -> None:
        fake.status["phase"] = "reloading"
        connection.event("spawned", generation=9, worker=15, pid=1)

    reloading(fake, then)

    said = ctl("reload", "--timeout", "2s")

    assert said.status == 4
    assert said.err.endswith(
        "not done within 2s: still waiting for generation 9 to become ready "
        "(0/1 workers are ready)\n"
    )


def test_a_timeout_says_what_is_waited_for_though_status_is_not_answered_at_the_end(
    fake: Fake, ctl: Ctl
) -> None:
    def then(connection: Connection) -> None:
        old, new = generation(8, "draining", worker(14)), generation(9, "serving", worker(15))
        fake.status.update(status(old, new))
        connection.event("route", generation=9)
        connection.event("reloaded", generation=9)

    real = fake.answers["status"]
    until = time.monotonic() + 1.5

    def late(connection: Connection, asked: Message) -> Message | None:
        return real(connection, asked) if time.monotonic() < until else None

    reloading(fake, then)
    fake.answers["status"] = late

    said = ctl("reload", "--drained", "--timeout", "2s")

    assert said.status == 4
    assert "not done within 2s: still waiting for generation 8 (1 worker: pid 4712" in said.err


@together("command", ["reload", "upgrade", "stop"])
@together("silent", ["events", "status", "reload upgrade stop"])
def test_a_timeout_bounds_the_wait_for_an_answer_too(
    fake: Fake, ctl: Ctl, command: str, silent: str
) -> None:
    # A stop that the real pid would make wait for this process.
    fake.status.update(pid=0, main_pid=0)
    answers = dict(fake.answers)
    fake.answers |= dict.fromkeys(silent.split(), lambda *_: None)

    said = ctl(command, "--timeout", "200ms")
    in_json = json.loads(ctl(command, "--timeout", "100ms", "--json").out)
    fake.answers = answers

    assert said.status == 4
    assert said.err.startswith("socketprotectorctl: not done within 200ms: ")
    assert in_json["result"] == "timed out"


@together("command", ["reload", "upgrade", "stop"])
def test_a_timeout_bounds_the_wait_for_a_protector_that_always_cuts(
    fake: Fake, ctl: Ctl, command: str
) -> None:
    fake.status.update(pid=0, main_pid=0)
    answers = dict(fake.answers)
    fake.answers |= dict.fromkeys(("status", command), lambda connection, _: connection.cut())

    said = ctl(command, "--timeout", "200ms")
    fake.answers = answers

    assert said.status == 4
    assert said.err.startswith("socketprotectorctl: not done within 200ms: ")


def test_settle_is_waited_for(fake: Fake, ctl: Ctl) -> None:
    def then(connection: Connection) -> None:
        fake.status["phase"] = "settling"
        connection.event("route", generation=9)

    reloading(fake, then)

    said = ctl("reload", "--timeout", "2s")

    assert said.status == 4
    assert "still waiting for generation 9 to survive --settle" in said.err


def test_drained_waits_for_the_end_of_the_old_generations(fake: Fake, ctl: Ctl) -> None:
    def then(connection: Connection) -> None:
        fake.status["generations"] = [
            generation(9),
            generation(8, "draining", worker(14), worker(15), active=2),
        ]
        connection.event("reloaded", generation=9)
        threading.Timer(0.3, gone, [connection]).start()

    def gone(connection: Connection) -> None:
        fake.status["generations"].pop()
        connection.event("drained", generation=8)

    reloading(fake, then)

    said = ctl("reload", "--drained")

    assert (said.status, said.out) == (
        0,
        "reloaded: generation 9 is serving in place of generation 8; "
        "all older generations have ended\n",
    )
    assert said.err == "drained 0/2 workers\ndrained 2/2 workers\n"


def test_drained_that_takes_too_long_says_which_workers_are_left(fake: Fake, ctl: Ctl) -> None:
    def then(connection: Connection) -> None:
        fake.status["generations"] = [generation(9), generation(8, "draining", worker(14, 77))]
        connection.event("reloaded", generation=9)

    reloading(fake, then)

    said = ctl("reload", "--drained", "--timeout", "2s", "--json")

    assert said.status == 4
    told = json.loads(said.out)
    assert (told["generation"], told["result"]) == (9, "timed out")
    assert "generation 8 (1 worker: pid 77, 3 connections) to drain" in said.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_waits_no_longer_and_claims_nothing(
    number: signal.Signals, fake: Fake
) -> None:
    reloading(fake, lambda c: c.event("spawned", generation=9, worker=15, pid=1))
    receive, send = os.pipe()
    process = forked.popen([*COMMAND, "reload"], stdout=subprocess.PIPE, stderr=send)
    os.close(send)
    err = Lines(receive)
    err.wait_for("generation 9 is starting")
    process.send_signal(number)
    out, _ = process.communicate(timeout=DEADLINE_S)
    err.join()

    assert (process.returncode, out) == (130, b"")
    assert err.seen[-1] == "interrupted: only the wait has ended; the operation continues"


@pytest.mark.parametrize("command", ["reload", "reload --no-wait", "stop", "upgrade"])
@pytest.mark.parametrize("sent", [False, True])
def test_interrupted_it_says_whether_anything_was_requested(
    fake: Fake, command: str, sent: bool
) -> None:
    """Not before the status is read, because a command decides by it whether to request."""
    words = command.split()
    silent = words[0] if sent else "status"
    fake.answers[silent] = lambda *_: None
    process = forked.popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    eventually(lambda: silent in fake.commands(), "the request that is not answered")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)

    assert (process.returncode, out) == (130, b"")
    assert err.decode() == (
        "interrupted: only the wait has ended; the operation continues\n"
        if sent
        else "interrupted: nothing was requested\n"
    )


#: What a deployment tool reads, whatever the result is: each field is there, and null if unknown.
OUTCOME = {
    "name": "web",
    "result": "reloaded",
    "from": 8,
    "generation": 9,
    "reason": None,
    "last_words": None,
    "lost": 0,
}


def outcome(said: Ended) -> Message:
    """The one line, without how long it took."""
    told: Message = json.loads(said.out)
    assert told.pop("waited_s") >= 0
    return told


def test_json_has_the_outcome(fake: Fake, ctl: Ctl) -> None:
    reloading(fake, lambda c: c.event("reload-failed", generation=9, reason="\x7f", last_words=""))

    said = ctl("reload", "--json")

    assert said.status == 3
    assert "\x7f" not in said.out
    assert outcome(said) == {**OUTCOME, "result": "failed", "reason": "\x7f"}


def test_json_of_a_good_one_has_the_same_fields(fake: Fake, ctl: Ctl) -> None:
    reloading(fake, lambda c: c.event("reloaded", generation=9))

    said = ctl("reload", "--json")

    assert (said.status, said.err) == (0, "")
    assert outcome(said) == OUTCOME


def test_json_has_the_last_words(fake: Fake, ctl: Ctl) -> None:
    reloading(
        fake,
        lambda c: c.event("reload-failed", generation=9, reason="exited", last_words="no\nbase"),
    )

    told = outcome(ctl("reload", "--json"))

    assert told == {**OUTCOME, "result": "failed", "reason": "exited", "last_words": "no\nbase"}


def test_json_has_a_reason_of_one_line_where_the_protector_gives_none(fake: Fake, ctl: Ctl) -> None:
    reloading(fake, lambda c: c.event("reload-failed", generation=9, last_words="no\nbase"))

    told = outcome(ctl("reload", "--json"))

    reason = "not reloaded: generation 9 failed; generation 8 is still serving"
    assert told == {**OUTCOME, "result": "failed", "reason": reason, "last_words": "no\nbase"}


def test_json_of_a_dry_run_has_the_same_fields(fake: Fake, ctl: Ctl) -> None:
    reloading(fake, lambda c: c.event("dry-run-passed", generation=9))

    said = ctl("reload", "--dry-run", "--json")

    assert (said.status, said.err) == (0, "")
    assert outcome(said) == {**OUTCOME, "result": "passed"}


def test_json_of_one_that_was_refused_has_the_same_fields(fake: Fake, ctl: Ctl) -> None:
    said = ctl("reload", "--json")  # the stand-in knows no reload

    assert said.status == 100
    assert outcome(said) == {
        **OUTCOME,
        "result": "refused",
        "generation": None,
        "reason": "unknown command 'reload'",
        "lost": None,
    }


@pytest.mark.parametrize(
    ("more", "lost"),
    [
        ({}, 5),  # 2 by a worker, 3 by the protector
        ({"lost": None}, None),  # workers accept
        ({"restarts": 1}, None),  # what was lost in between is not known
        ({"generations": [generation(9, lost=None)]}, None),  # without the client library
    ],
)
def test_json_counts_the_connections_that_were_lost(
    fake: Fake, ctl: Ctl, more: Message, lost: int | None
) -> None:
    fake.status["lost"] = 4

    def then(connection: Connection) -> None:
        connection.event("exited", generation=8, worker=14, lost=2)
        fake.status.update({"generations": [generation(9)], "lost": 7, **more})
        connection.event("reloaded", generation=9)

    reloading(fake, then)

    assert outcome(ctl("reload", "--json")) == {**OUTCOME, "lost": lost}


def test_a_protector_that_has_no_dry_run_is_not_asked_for_one(fake: Fake, ctl: Ctl) -> None:
    del fake.status["dry_run"]

    said = ctl("reload", "--dry-run")

    assert (said.status, said.out) == (100, "")
    assert said.err.startswith(
        "socketprotectorctl: web runs version 0.9.0, which has no dry run; nothing was tried"
    )
    assert "reload" not in fake.commands()


def test_no_wait_says_that_it_was_asked(fake: Fake, ctl: Ctl) -> None:
    reloading(fake, lambda _: None)

    assert ctl("reload", "--no-wait") == Ended(
        0, "reload requested: generation 9 will start; see `socketprotectorctl status`\n", ""
    )
    assert ctl("reload", "--no-wait", "--drained").status == 2
    done = ctl("reload", "--no-wait", "--dry-run", "--json")
    assert json.loads(done.out)["result"] == "requested"
    assert json.loads(done.out)["generation"] == 9


def test_a_request_without_a_wait_prints_its_refusal_as_json(fake: Fake, ctl: Ctl) -> None:
    def answer(_: Connection, __: Message) -> Message:
        raise Refusing("refused", "cannot reload: a stop is in progress")

    fake.answers["reload"] = answer

    done = ctl("reload", "--no-wait", "--json")

    assert done.status == 100
    said = json.loads(done.out)
    assert (said["result"], said["generation"]) == ("refused", None)
    assert "a stop is in progress" in said["reason"]


def test_a_refusal_is_status_100(fake: Fake, ctl: Ctl) -> None:
    def answer(_: Connection, __: Message) -> Message:
        raise Refusing("refused", "cannot reload: a stop is in progress")

    fake.answers["reload"] = answer

    said = ctl("reload")

    assert (said.status, said.err) == (
        100,
        "socketprotectorctl: cannot reload: a stop is in progress\n",
    )


def test_a_user_that_may_not_ask_is_refused_in_json_too(fake: Fake, ctl: Ctl) -> None:
    def answer(_: Connection, __: Message) -> Message:
        raise Refusing("denied", "permission denied")

    fake.answers["events"] = answer

    said = ctl("reload", "--json")

    assert said.status == 100
    assert json.loads(said.out)["result"] == "refused"


def waiting(at: float, *reasons: str, **more: Any) -> Message:
    """A status of a release that starts, and waits for this."""
    told = [
        {"kind": "start", "generation": 9, "reason": each, "left_s": 100.0 - at} for each in reasons
    ]
    return {"now": at, "phase": "reloading", "generations": [generation(9, "starting")]} | {
        "waits_for": told,
        **more,
    }


def test_a_reload_that_waits_for_this_one_is_no_wait_of_this_one() -> None:
    """Two people reload: each is shown what its own reload waits for."""
    said: list[str] = []
    first, second = (Reload(each, {"phase": "serving"}, said.append) for each in (9, 10))
    later = {"kind": "earlier-reload", "reason": "begins after the current reload"}
    for each in (first, second):
        assert "waiting: begins after the current reload" not in said
        for at in (1.0, 9.0):  # it lasts
            found = waiting(at, "0 of 1 worker ready")
            found["waits_for"].append(later)
            each.on_status(found)
    assert "waiting: begins after the current reload" in said


def test_each_wait_has_its_reason_in_the_progress_and_is_repeated_now_and_then() -> None:
    said: list[str] = []
    reload = Reload(9, {"phase": "serving"}, said.append)

    reload.on_status(waiting(1.0, "last answer to GET /healthz: 500"))
    for at in range(2, 13):
        reload.on_status(waiting(float(at), "last answer to GET /healthz: 500"))
    reload.on_status(waiting(20.0, "last answer to GET /healthz: 404\x1b[2J"))
    reload.on_status(waiting(20.1, "so many that change at once"))

    assert [each for each in said if each.startswith("waiting")] == [
        "waiting: last answer to GET /healthz: 500, 98 s left",
        "waiting: last answer to GET /healthz: 500, 88 s left",
        "waiting: last answer to GET /healthz: 404\\x1b[2J, 80 s left",
    ]
    assert reload.waits_for().endswith(": so many that change at once")


def test_a_reload_whose_generation_got_a_higher_number_has_its_verdict() -> None:
    succeeded = Reload(9, {"phase": "serving"}, lambda _: None)
    succeeded.on_status(status(reloads=[reload(8, "failed", "no table"), reload(10, "reloaded")]))

    assert succeeded.verdict is not None
    assert (succeeded.verdict.succeeded, succeeded.verdict.generation) == (True, 10)


def test_a_wait_that_is_soon_over_is_no_line() -> None:
    said: list[str] = []
    waits = WaitsShown(said.append)

    for at in (1.0, 1.3):
        waits.on_status(waiting(at, "brief"), ("start",))
    waits.on_status({"now": 1.4}, ("start",))
    for at in (1.5, 1.8, 2.0):
        waits.on_status(waiting(at, "lasting"), ("start",))

    assert said == ["waiting: lasting, 98 s left"]


def test_what_keeps_no_reload_is_not_in_its_progress() -> None:
    said: list[str] = []
    reload = Reload(9, {"phase": "serving"}, said.append)

    reload.on_status(waiting(1.0, waits_for=[{"kind": "drain", "generation": 7, "reason": "x"}]))
    reload.on_status({"phase": "reloading", "generations": [], "reload_wanted": True})

    assert not [each for each in said if "x" in each.split()]


def test_a_reload_is_not_forgotten_while_an_old_generation_quiesces_first() -> None:
    """Under --reload-order stop-first: no generation has the route, and none is starting."""
    quiescing = {"phase": "waiting", "generations": [{"number": 1, "phase": "draining"}]}
    reload = Reload(2, {"phase": "serving"}, lambda _: None)

    for _ in range(10):
        reload.on_status(quiescing)

    assert reload.verdict is None


def test_a_reload_that_the_protector_has_forgotten_is_no_success(fake: Fake, ctl: Ctl) -> None:
    reloading(fake, lambda _: None)

    said = ctl("reload", "--timeout", "60s")

    assert said.status == 3
    assert "the verdict is no longer known" in said.err


# -- an output that takes nothing ----------------------------------------------------------


@together(
    ("result", "as_json", "where"),
    [
        ("reloaded", (), "full"),
        ("reload-failed", ("--json",), "full"),
        ("reloaded", ("--json",), "closed"),
        ("reload-failed", ("--json",), "gone"),
    ],
)
def test_where_the_outcome_cannot_be_written_the_exit_status_still_tells_it(
    result: str, as_json: tuple[str, ...], where: str, fake: Fake
) -> None:
    def then(connection: Connection) -> None:
        more = {"reason": "no"} if result == "reload-failed" else {}
        connection.event(result, generation=9, **more)

    reloading(fake, then)

    said = run_into(where, "reload", *as_json)

    assert said.status == (0 if result == "reloaded" else 3)
    assert "Traceback" not in said.err
    said_so = "cannot write the outcome to stdout: No space left on device" in said.err
    assert said_so == (where == "full")


@together(
    ("where", "words", "wanted"),
    [
        ("full", ["list"], "cannot write the output: No space left on device"),
        ("full", ["status", "--json"], "cannot write the output: No space left on device"),
        ("full", ["--help"], "cannot write the output: No space left on device"),
        ("full", ["--version"], "cannot write the output: No space left on device"),
        ("closed", ["status"], ""),
        ("gone", ["--help"], ""),
        ("gone", ["status"], ""),
    ],
)
def test_an_answer_that_cannot_be_written_is_one_line(
    where: str, words: list[str], wanted: str, fake: Fake
) -> None:
    assert fake.path.exists()

    said = run_into(where, *words)

    assert said.err == (f"socketprotectorctl: {wanted}\n" if wanted else "")
    assert said.status == (1 if wanted else 0)
