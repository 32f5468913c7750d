"""status, crashes, diff, events: what is shown, and that nothing in it drives a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from socketprotector.ctl import queries, render
from socketprotector.model.policy import Policy
from tests import forked
from tests.running import DEADLINE_S, Ended, Lines, eventually
from tests.together import together
from tests.unit.ctl.conftest import COMMAND, run
from tests.unit.ctl.fake import (
    Connection,
    Fake,
    Message,
    Refusing,
    awaited,
    canary,
    crash,
    entry,
    generation,
    health,
    reload,
    rolling,
    status,
    worker,
)

Ctl = Callable[..., Ended]
UNKNOWN_HISTORY = [
    (
        "unknown",
        "this protector is older than socketprotectorctl and does not know history; run "
        "`socketprotectorctl upgrade`, or see `socketprotectorctl status`",
    ),
    ("failed", "unknown command 'history'; known: status, reload"),
]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"lame_duck": "on"}, "lame duck: /readyz answers 503; still serving"),
        (
            {"phase": "stopping", "lame_duck": "stopping", "lame_duck_s": 12.0},
            "lame duck: /readyz answers 503; still serving, the stop begins in 12s",
        ),
    ],
)
def test_status_and_list_tell_of_a_lame_duck(
    more: Message, told: str, fake: Fake, ctl: Ctl
) -> None:
    fake.status = status(**more)

    assert ctl("status").out.splitlines()[1] == told
    assert " lame duck " in ctl("list").out


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            health("unhealthy", 'GET /healthz: 500, "database gone"'),
            'unhealthy for 1m: GET /healthz: 500, "database gone"',
        ),
        (
            health("unhealthy", "busy: no worker has accepted the probe yet", "GET /: 500, gone"),
            "unhealthy for 1m: GET /: 500, gone; last: busy: no worker has accepted the probe yet",
        ),
        (
            health("unknown", "not probed: the probe process was killed by SIGKILL"),
            "health is unknown; last: not probed: the probe process was killed by SIGKILL",
        ),
        (
            health("healthy", "busy: no worker has accepted the probe yet"),
            "health is healthy; last: busy: no worker has accepted the probe yet",
        ),
    ],
)
def test_status_and_list_tell_of_health(found: Message, told: str, fake: Fake, ctl: Ctl) -> None:
    fake.status = status(health=found)

    assert ctl("status").out.splitlines()[1] == told
    assert (" unhealthy " in ctl("list").out) == told.startswith("unhealthy")


def test_status_says_what_is_waited_for(fake: Fake, ctl: Ctl) -> None:
    reason = {"kind": "settle", "generation": 9, "reason": "settling", "left_s": 3.5}
    assert "waiting: " not in ctl("status").out
    fake.status["waits_for"] = [reason]
    assert "\nwaiting: settling, 4 s left\n" in ctl("status").out
    assert json.loads(ctl("status", "--json").out)["waits_for"] == [reason]


@pytest.mark.parametrize(
    ("rollout", "told"),
    [
        (canary(), "generation 9 gets 5% of new connections (1,230 so far); it gets all in 41s"),
        (canary(met=None), "generation 9 gets 5% of new connections; it gets all in 41s"),
        (
            canary(met=12, at_least=100),
            "generation 9 gets 5% of new connections (12 of at least 100 so far); "
            "the count is checked in 41s",
        ),
        (
            canary(share=0.25, at_least=100, left_s=None),
            "generation 9 gets 0.25% of new connections (1,230 so far); "
            "it gets all after the next good --settle-check",
        ),
        (
            canary("all", left_s=300),
            "generation 9 gets all new connections (1,230 so far); the reload ends in 5m",
        ),
        (
            rolling(stage="settling", left_s=9.9),
            "3 of 8 workers replaced; the reload continues in 10s",
        ),
        (rolling(), "3 of 8 workers replaced"),
        (
            rolling(awaited(5, 2, 240.9)),
            "3 of 8 workers replaced, waiting for worker 5 (2 connections, longest 4m)",
        ),
        (
            rolling(*map(awaited, range(1, 8), (None, 0, 1))),
            "3 of 8 workers replaced, waiting for worker 1, worker 2 (no connection), "
            "worker 3 (1 connection)",
        ),
        (
            rolling(*(awaited(number) for number in range(1, 8)), wanted=1, replaced=0),
            "0 of 1 worker replaced, waiting for worker 1, worker 2, worker 3 and 4 more",
        ),
    ],
)
def test_status_says_how_far_a_rollout_is(
    rollout: Message, told: str, fake: Fake, ctl: Ctl
) -> None:
    waits = [{"kind": kind, "reason": kind} for kind in ("canary", "rolling", "settle", "drain")]
    fake.status = status(rollout=rollout, waits_for=waits)

    lines = ctl("status").out.splitlines()

    assert lines[1] == f"rollout: {told}"
    assert [each for each in lines if each.startswith("waiting: ")] == ["waiting: drain"]


def test_status_names_the_release(fake: Fake, ctl: Ctl) -> None:
    assert "release" not in ctl("status").out
    fake.status["releases"] = {"serving": "2026-11-22", "current": "2026-11-22"}
    assert ctl("status").out.splitlines()[0].endswith(", release 2026-11-22")


def test_the_table_of_generations_says_which_has_which_share(fake: Fake, ctl: Ctl) -> None:
    def shares(rollout: Message | None) -> list[str]:
        there = [generation(number, phase) for number, phase in phases.items()]
        fake.status = status(*there, route=8, rollout=rollout)
        table = [line.split() for line in ctl("status").out.splitlines()]
        [at] = [n for n, line in enumerate(table) if line[:1] == ["GEN"]]
        assert ("SHARE" in table[at]) == bool(rollout)
        return [line[2] for line in table[at + 1 : at + 4]]

    phases = {7: "draining", 8: "serving", 9: "settling"}
    assert shares(canary()) == ["5%", "95%", "0%"]
    assert shares(rolling(share=33.33)) == ["33.33%", "66.67%", "0%"]
    shares(None)


def test_the_start_of_a_rolling_reload_is_a_wait_like_others(fake: Fake, ctl: Ctl) -> None:
    start = {"kind": "start", "reason": "generation 9 starts"}
    fake.status = status(rollout=rolling(stage="starting", share=0.0), waits_for=[start])

    out = ctl("status").out

    assert "rollout" not in out
    assert "SHARE" not in out
    assert "\nwaiting: generation 9 starts\n" in out


def test_what_is_healthy_is_told_in_a_word(fake: Fake, ctl: Ctl) -> None:
    fake.status = status(health=health("healthy"))

    assert ctl("status").out.splitlines()[0].endswith(", healthy")
    assert " serving " in ctl("list").out


def test_status_says_when_a_reload_or_a_dry_run_began(fake: Fake, ctl: Ctl) -> None:
    running = reload(10, "running")

    fake.status = status(reloads=[running])
    assert "\nreload in progress: generation 10 began 50s ago\n" in ctl("status").out

    fake.status = status(dry_run=running)
    assert "\ndry run in progress: generation 10 began 50s ago\n" in ctl("status").out


def test_status_shows_what_runs(fake: Fake, ctl: Ctl) -> None:
    fake.status = status(
        generation(8, "draining", worker(14, 4712), accepted=None, active=None, wait_us=None),
        generation(9, "serving", worker(15, 4713), worker(16, 4714, "starting")),
        pid=11,
        held_s=12.0,
        restarts=1,
        guarded=True,
        reloads=[reload(10, "failed", "no; its last words:\nmany\nlines")],
        crashes=2,
    )

    said = ctl("status")

    assert said.status == 0
    assert said.out.splitlines() == [
        "web: serving, pid 11, version 0.9.0, up 2m30s, 1 restart or upgrade, guarded",
        "held: no connection is accepted for another 12s",
        "forwarded 12,345, lost 0, queue limit 278, ready by notify; command: ./daemon",
        "listens on tcp:0.0.0.0:4321, 3 of 4,096 in the backlog",
        "last reload: generation 10 failed 49s ago: no",
        "2 workers failed; see `socketprotectorctl crashes`",
        "",
        "GEN  PHASE       AGE  READY  QUEUE  ACTIVE  ACCEPTED  ERRORS  LOST  WAIT-P50    P99",
        "  9  serving   1m40s    1/2      0       3       120       0     0      63us  1.0ms",
        "  8  draining  1m40s    1/1      0       -         -       0     0         -      -",
        "",
        "WORKER  GEN   PID  STATE       AGE  ACTIVE  ACCEPTED  ERRORS  SAYS",
        "    15    9  4713  ready     1m40s       1        60       0",
        "    16    9  4714  starting  1m40s       1        60       0",
        "    14    8  4712  ready     1m40s       1        60       0",
    ]


#: What workers that do not use the client library leave unknown.
_UNKNOWN: Message = dict.fromkeys(("active", "accepted", "finished", "errors"))


def test_status_of_an_unmodified_server_leaves_out_what_cannot_be_known(
    fake: Fake, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = worker(14, 4712, "ready", **_UNKNOWN)
    served = generation(8, "serving", there, **_UNKNOWN, lost=None, wait_us=None)
    unknown = dict.fromkeys(("forwarded", "lost", "queue_limit"))
    fake.status = status(served, handoff="listener", warnings=["it lacks \x1b"], **unknown)
    monkeypatch.setattr(queries, "children_of", lambda _: {4712: [4713, 4714, 4715, 4716, 4720]})

    said = ctl("status")

    assert said.out.splitlines() == [
        "web: serving, pid {}, version 0.9.0, up 2m30s".format(fake.status["pid"]),
        "warning: it lacks \\x1b",
        "ready by notify; command: ./daemon",
        "listens on tcp:0.0.0.0:4321, 3 of 4,096 in the backlog",
        "",
        "GEN  PHASE      AGE  READY  QUEUE",
        "  8  serving  1m40s    1/1      0",
        "",
        "WORKER  GEN   PID  STATE    AGE  CHILDREN                    SAYS",
        "    14    8  4712  ready  1m40s  5: 4713 4714 4715 4716 ...",
        "",
        "not shown: ACTIVE, ACCEPTED, ERRORS, LOST, WAIT-P50, P99: workers accept clients "
        "themselves, so SocketProtector cannot count these; see `socketprotectorctl connections`",
    ]


def test_what_one_generation_knows_is_a_column_for_all(fake: Fake, ctl: Ctl) -> None:
    old = generation(7, "draining", worker(13, 4711), **_UNKNOWN, lost=None, wait_us=None)
    new = generation(8, "serving", worker(14, 4712, "ready", **_UNKNOWN))
    fake.status = status(old, new)

    out = ctl("status").out

    assert " ACCEPTED  ERRORS  LOST  WAIT-P50" in out
    assert "not shown" not in out


def test_what_workers_without_the_library_do_not_count_is_left_out_once_they_serve(
    fake: Fake, ctl: Ctl
) -> None:
    for state, hidden in (("starting", False), ("ready", True)):
        mute = generation(8, state, worker(14, 4712, state, **_UNKNOWN), **_UNKNOWN, lost=None)
        fake.status = status({**mute, "wait_us": None})

        out = ctl("status").out

        assert ("not shown: ACTIVE, ACCEPTED" in out) is hidden
        assert ("do not use the client library" in out) is hidden


def test_programs_of_an_exited_pool_are_not_counted(fake: Fake, ctl: Ctl) -> None:
    pool = worker(14, 4712, "ready", **_UNKNOWN, orphaned=True)
    served = generation(8, "serving", pool, **_UNKNOWN, lost=None, wait_us=None)
    fake.status = status(served, handoff="stdio")

    assert "cannot count the connections of an orphaned worker" in ctl("status").out


def test_nothing_that_a_worker_says_reaches_the_terminal_as_it_is(fake: Fake, ctl: Ctl) -> None:
    evil = "\x1b]0;owned\x07\n\x9b31m\x7f\u202e[bold]"
    fake.status = status(generation(8, "serving", worker(14, status=evil)), name=evil)
    crashes = [crash(how=evil, last_words=evil, lost=None)]
    fake.answers["crashes"] = lambda *_: {"crashes": crashes}
    entries = [entry(evil, 1, evil, f"{evil}\n{evil}")]
    fake.answers["history"] = lambda *_: {"history": entries}
    fake.answers["diff"] = lambda *_: {"changes": [evil]}

    for arguments in (["status"], ["crashes"], ["history"], ["diff"], ["list"]):
        for more in ([], ["--json"]):
            said = ctl(*arguments, *more)

            assert said.status == 0
            shown = said.out.replace("\n", "")
            assert shown.isascii(), shown
            assert not set(map(chr, range(32))) & set(shown)
            assert "\x7f" not in shown
    assert "\\x1b]0;owned" in ctl("status").out


def test_nonsense_instead_of_numbers_is_shown_as_unknown(fake: Fake, ctl: Ctl) -> None:
    fake.status = {"name": 3, "generations": [{"number": "x", "workers": 7, "wait_us": []}, 5]}

    assert ctl("status").status == 0


def terminal(*arguments: str, **environment: str) -> str:
    """What a command shows on a terminal."""
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [*COMMAND, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment},
        check=False,
    )
    os.close(theirs)
    assert done.returncode == 0
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(ours)
    return shown.decode()


def test_colours_only_on_a_terminal_and_not_with_no_color(fake: Fake) -> None:
    assert "\x1b[32m" in terminal("status")
    assert "\x1b[32m" not in terminal("status", NO_COLOR="1")
    assert "\x1b" not in run("status").out


def test_a_terminal_of_unknown_size_shows_all(fake: Fake) -> None:
    assert "GEN" in terminal("status", COLUMNS="0", LINES="0")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, ""),
        ({"lame_duck": "on"}, "lame duck"),
        ({"phase": "stopping", "lame_duck": "stopping"}, "lame duck"),
        ({"held_s": 3.0}, ""),
        ({"held_s": 3.0, "lame_duck": "on"}, "lame duck"),
        ({"phase": "stopping"}, "stopping"),
        ({"phase": "starting", "route": None}, "starting"),
        ({"phase": 7, "route": None}, "no generation is serving"),
    ],
)
def test_ready_is_an_exit_status(more: Message, why: str, fake: Fake, ctl: Ctl) -> None:
    fake.status = status(**more)

    said, as_json = ctl("ready"), ctl("ready", "--json")

    if why:
        assert said == Ended(3, "", f"socketprotectorctl: not ready: {why}\n")
    else:
        assert said == Ended(0, "ready: generation 8 is serving\n", "")
    assert as_json.status == said.status
    assert json.loads(as_json.out) == {"ready": not why, "why": why or None}


def test_what_is_unhealthy_is_not_ready_where_that_is_asked_for(fake: Fake, ctl: Ctl) -> None:
    fake.status = status(health=health("unhealthy", "busy: none yet", "GET /: 500, gone"))

    assert ctl("ready").status == 0
    said = ctl("ready", "--health")
    assert said == Ended(3, "", "socketprotectorctl: not ready: unhealthy: GET /: 500, gone\n")
    fake.status = status(health=health("unknown"))
    assert ctl("ready", "--health").status == 0


def test_ready_of_none_is_status_1(folder: Path, ctl: Ctl) -> None:
    assert ctl("ready").status == 1
    assert ctl("--name", "web", "ready").status == 1


def test_last_words_are_shown_in_any_locale(fake: Fake) -> None:
    entries = [entry("reload", 9, "failed", "exited:\nd\u00e9j\u00e0 \u4e2d\ufffd")]
    fake.answers["history"] = lambda *_: {"history": entries}

    said = run("history", "--control", fake.path, PYTHONIOENCODING="ascii")

    assert (said.status, said.err) == (0, "")
    assert "  | d\\xe9j\\xe0 \\u4e2d\\ufffd\n" in said.out


def test_history(fake: Fake, ctl: Ctl) -> None:
    why = "./daemon exited with status 1 before it was ready; its last words:\nno such table\n"
    entries = [
        entry("reload", 2, "reloaded"),
        entry("reload", 3, "failed", why),
        entry("dry-run", 4, "passed"),
        entry("health", 2, "unhealthy", "GET /healthz: 500", ended_at=150.0),
        entry("health", 2, "healthy", ended_at=150.0),
        entry("reload", 5, "running"),
    ]
    fake.answers["history"] = lambda *_: {"history": entries}

    at = "1970-01-01T00:02:30Z"
    assert ctl("history").out.splitlines() == [
        f"{at} reload: generation 2 reloaded after 1.0s",
        f"{at} reload: generation 3 failed after 1.0s: ./daemon exited with status 1 before it was "
        "ready",
        "  | no such table",
        f"{at} dry-run: generation 4 passed after 1.0s",
        f"{at} health: generation 2 unhealthy: GET /healthz: 500",
        f"{at} health: generation 2 healthy",
        f"{at} reload: generation 5 running",
    ]
    assert json.loads(ctl("history", "--json").out) == {"history": entries}
    fake.answers["history"] = lambda *_: {"history": []}
    assert ctl("history").out == "no reload, dry run or change of health yet\n"


@together(("code", "told"), UNKNOWN_HISTORY)
def test_history_of_a_protector_that_refuses_it(fake: Fake, ctl: Ctl, code: str, told: str) -> None:
    def refuse(*_: object) -> Message:
        raise Refusing(code, "unknown command 'history'; known: status, reload")

    fake.answers["history"] = refuse

    assert ctl("history") == Ended(100, "", f"socketprotectorctl: {told}\n")


def test_crashes(fake: Fake, ctl: Ctl) -> None:
    fake.answers["crashes"] = lambda *_: {"crashes": [crash()]}

    assert ctl("crashes").out == (
        "1970-01-01T00:00:00Z worker 14 of generation 8, pid 4712, was killed by SIGSEGV while "
        "serving; connections lost: 3, CPU 1.2s, memory 30.3M\n  | one\n  | two\n"
    )
    fake.answers["crashes"] = lambda *_: {"crashes": []}
    assert ctl("crashes").out == "no crashes\n"


def test_crashes_say_what_would_keep_last_words(fake: Fake, ctl: Ctl) -> None:
    answer: Message = {
        "crashes": [crash(last_words="")],
        "last_words_hint": "see the journal; --keep",
    }
    fake.answers["crashes"] = lambda *_: answer
    assert ctl("crashes").out.endswith("\nno last words: see the journal; --keep\n")

    kept: list[Message] = [{"crashes": [crash()]}, {"last_words_hint": None}, {"crashes": []}]
    for known in kept:
        fake.answers["crashes"] = partial(lambda known, *_: {**answer, **known}, known)
        assert "no last words" not in ctl("crashes").out


def test_diff(fake: Fake, ctl: Ctl) -> None:
    fake.answers["diff"] = lambda *_: {"changes": ["workers: 1 -> 2"]}
    assert ctl("diff") == Ended(0, "workers: 1 -> 2\n", "")
    assert fake.commands()[-2:] == ["events", "diff"]  # so that it may take more than 30 s
    assert Policy().start_timeout_s < queries._DIFF_S, "so that a reading without end has a reason"
    fixed = {"changes": ["name: a -> b; needs a restart"], "needs_restart": ["name"]}
    fake.answers["diff"] = lambda *_: fixed
    said = ctl("diff")
    assert (said.status, said.out) == (3, "name: a -> b; needs a restart\n")
    assert said.err.startswith("socketprotectorctl: a reload would be refused: 1 of the changes ")
    assert (ctl("diff", "--json").status, json.loads(ctl("diff", "--json").out)) == (3, fixed)

    def invalid(*_: object) -> Message:
        raise Refusing("refused", "web.toml:3: workers: not a number")

    fake.answers["diff"] = invalid
    said = ctl("diff")
    assert said.status == 3
    assert said.err == (
        "socketprotectorctl: a reload would fail: web.toml:3: workers: not a number\n"
    )


def test_events_go_on_across_a_cut_and_end_by_ctrl_c(fake: Fake) -> None:
    def follow(connection: Connection, asked: Message) -> None:
        connection.send({"v": 1, "id": asked["id"], "ok": True, "result": {}})
        connection.event("reloaded", generation=9, reason='a "b"\x1b')

    fake.answers["events"] = follow
    receive, send = os.pipe()
    process = forked.popen([*COMMAND, "events"], stdout=send, stderr=subprocess.DEVNULL)
    os.close(send)
    lines = Lines(receive)
    line = lines.wait_for("event=reloaded")
    assert line.endswith('info    event=reloaded generation=9 reason="a \\"b\\"\\x1b"')
    fake.cut_all()
    eventually(lambda: lines.count("event=reloaded") == 2, "the event after the cut")
    process.send_signal(signal.SIGINT)

    assert process.wait(DEADLINE_S) == 130
    lines.join()


def test_events_follow_waits_for_a_protector_that_is_yet_to_come(folder: Path) -> None:
    receive, send = os.pipe()
    process = forked.popen(
        [*COMMAND, "--control", str(folder / "late"), "events", "--follow"], stdout=send
    )
    os.close(send)
    lines = Lines(receive)
    fake = Fake(folder / "late")

    def more() -> bool:
        for each in fake.following():
            each.event("ready", generation=1)
        return lines.count("event=ready") > 0

    eventually(more, "an event")
    process.terminate()
    process.wait(DEADLINE_S)
    fake.end()
    lines.join()


def test_events_of_an_unknown_name_are_an_error(folder: Path, ctl: Ctl) -> None:
    said = ctl("--name", "web", "events", "--follow")

    assert said.status == 1
    assert "--name web: no protector of that name in" in said.err


def test_a_reader_that_has_read_enough_is_no_failure(fake: Fake) -> None:
    receive, send = os.pipe()
    os.close(receive)
    process = forked.popen([*COMMAND, "status"], stdout=send, stderr=subprocess.PIPE)
    os.close(send)
    _, err = process.communicate(timeout=DEADLINE_S)

    assert (process.returncode, err) == (0, b"")


@together(
    ("seconds", "shown"),
    [(0, "0.0s"), (9.96, "10.0s"), (59, "59s"), (60, "1m"), (3725, "1h2m"), (90061, "1d1h")],
)
def test_times_are_short(seconds: float, shown: str) -> None:
    assert render.duration_text(seconds) == shown


def test_a_sparkline_reaches_from_nothing_to_the_highest() -> None:
    assert render.sparkline([9, 0, 1, 4, 8], 4) == " ▁▄█"
    assert render.sparkline([0, 0], 5) == "  "
    assert render.sparkline([], 5) == ""
