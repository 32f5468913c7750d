"""The log of a real run: a crash loop does not fill the disk."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from socketprotector.system.crash_loop_summary import SHOWN
from tests.procfs import children_of, environment_of
from tests.retelling import retell
from tests.running import Client, Protector, eventually
from tests.scenarios.tools import Release, pid_in, spawned, worker

Start = Callable[..., Protector]
WORKERS = 3


@pytest.fixture
def looping(protector: Start, tmp_path: Path) -> Callable[..., Protector]:
    """Start a protector whose workers serve, and then die as soon as they start, again and again.

    Each start of one is a line in the file `starts`.
    """

    def start(*options: str) -> Protector:
        release = Release(tmp_path / "daemon")
        release.becomes(*worker("many"))
        daemon = protector(
            *options, "--workers", str(WORKERS), "127.0.0.1:0", "--", str(release.path)
        ).ready()
        release.write(f"#!/bin/sh\necho $$ >> {tmp_path}/starts\necho out of luck >&2\nexit 7\n")
        for pid in spawned(daemon):
            os.kill(pid, signal.SIGKILL)
        return daemon

    return start


def starts(folder: Path) -> int:
    file = folder / "starts"
    return len(file.read_text().splitlines()) if file.exists() else 0


def stop_in_between(daemon: Protector) -> None:
    """Stop it while none of its workers lives; seconds pass before the next ones are started.

    One that is ended in the middle has written less than the others.
    """
    eventually(lambda: daemon.worker_pids() == [], "the end of those that were started")
    daemon.stop()


def told_until(daemon: Protector, event: str) -> tuple[list[str], list[str]]:
    """The log before and after a line."""
    at = next(n for n, line in enumerate(daemon.log.seen) if f"event={event}" in line)
    return daemon.log.seen[:at], daemon.log.seen[at:]


@pytest.mark.costly
def test_a_crash_loop_is_a_few_lines_and_a_count(
    looping: Callable[..., Protector], tmp_path: Path
) -> None:
    daemon = looping()
    eventually(lambda: starts(tmp_path) >= WORKERS * (SHOWN + 3), "a crash loop")
    stop_in_between(daemon)

    before, after = told_until(daemon, "stopping")
    assert len([line for line in before if "event=exited" in line]) == 2 * WORKERS * SHOWN
    loops = [line for line in before if "event=crash-loop" in line]
    assert len(loops) == WORKERS
    counted = sum(int(re.findall(r" deaths=(\d+)", line)[0]) for line in loops)
    at_the_end = [line for line in after if re.search("event=exited .*worker=", line)]
    assert counted + len(at_the_end) == starts(tmp_path) + WORKERS
    assert all('how="exited with status 7"' in line and "reason=" in line for line in loops)
    # What workers say is not ours to fold.
    assert sum(line == "out of luck" for line in daemon.log.seen) == starts(tmp_path)


@pytest.mark.costly
def test_at_level_debug_all_of_it_is_logged(
    looping: Callable[..., Protector], tmp_path: Path
) -> None:
    daemon = looping("--verbose")
    eventually(lambda: starts(tmp_path) >= WORKERS * (SHOWN + 2), "a crash loop")
    stop_in_between(daemon)

    assert daemon.log.count("event=crash-loop") == 0
    assert daemon.log.count("event=exited .*worker=") == starts(tmp_path) + WORKERS


# -- the log retells the run ---------------------------------------------------------


def generations_seen(daemon: Protector) -> dict[int, set[int]]:
    """The workers of each generation that live, asked of the system and not of the log."""
    found: dict[int, set[int]] = {}
    for pid in children_of(daemon.pid):
        try:
            environment = environment_of(pid)
        except OSError:
            continue
        if "SOCKETPROTECTOR_GENERATION" in environment:
            found.setdefault(int(environment["SOCKETPROTECTOR_GENERATION"]), set()).add(pid)
    return found


def test_the_guards_lines_have_the_form_of_the_others(protector: Start) -> None:
    daemon = protector(
        *("--guard", "--log-format", "json", "127.0.0.1:0", "--", *worker("many"))
    )  # fmt: skip
    started = json.loads(daemon.log.wait_for('"event": "start"'))
    daemon.log.wait_for('"event": "ready"')
    os.kill(started["pid"], signal.SIGKILL)
    died = json.loads(daemon.log.wait_for('"event": "protector-died"'))
    daemon.log.wait_for('"event": "resumed"')
    daemon.stop()

    assert died.pop("time")
    assert died.pop("again_in_s") <= 0.1  # 0 if the guard had heard that it serves
    assert died == {
        "level": "warning",
        "event": "protector-died",
        "protector": "killed by signal 9",
    }
    assert all(json.loads(line)["event"] for line in daemon.log.seen)


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_retells_the_run(protector: Start, tmp_path: Path, form: str) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*worker("many"))
    daemon = protector(
        *("--log-format", form, "--workers", "2", "127.0.0.1:0", "--", str(release.path))
    )
    seen: list[dict[int, set[int]]] = []

    def after(phases: dict[int, str], wanted: int) -> None:
        """Wait until the log has so much, and says the same of workers as the system does."""

        def told() -> bool:
            run = retell(list(daemon.log.seen))
            seen[-1] = generations_seen(daemon)
            return (
                {n: each.phase for n, each in run.generations.items()} == phases
                and all(len(run.generations[n].ready) == wanted for n in phases if n == max(phases))
                and run.pids() == seen[-1]
            )

        seen.append({})
        eventually(told, f"{phases} in the log, and the workers of the system")

    after({1: "serving"}, 2)
    port = int(re.findall(r"tcp:127.0.0.1:(\d+)", daemon.log.text())[0])
    with Client(("127.0.0.1", port)) as held:
        first = pid_in(held.ask())
        daemon.signal(signal.SIGHUP)
        eventually(lambda: generations_seen(daemon).get(1) == {first}, "the idle one's end")
        after({1: "draining", 2: "serving"}, 2)
        assert seen[-1][1] == {first}

        release.write("#!/bin/sh\nexit 1\n")
        daemon.signal(signal.SIGHUP)
        daemon.log.wait_for("event.*reload-failed")
        after({1: "draining", 2: "serving"}, 2)

        release.becomes(*worker("many"))
        killed = min(generations_seen(daemon)[2])
        os.kill(killed, signal.SIGKILL)
        daemon.log.wait_for("event.*exited.*SIGKILL")
        after({1: "draining", 2: "serving"}, 2)

        daemon.signal(signal.SIGTTIN)
        daemon.log.wait_for("event.*scaled")
        after({1: "draining", 2: "serving"}, 3)
    after({2: "serving"}, 3)
    daemon.stop()

    assert {number: len(pids) for number, pids in seen[-1].items()} == {2: 3}
    run = retell(daemon.log.seen)
    assert run.phases == [
        *((1, "starting"), (1, "settling"), (1, "serving")),
        *((2, "starting"), (2, "settling"), (1, "draining"), (2, "serving")),
        *((3, "starting"), (3, "abandoned"), (3, "gone")),
        *((1, "gone"), (2, "draining"), (2, "gone")),
    ]
    assert run.wanted == 3
    assert run.ended
    assert run.generations == {}
