"""The log of a real run: a crash loop does not fill the disk."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from socketprotector.fold import SHOWN
from tests.running import Protector, eventually
from tests.scenarios.tools import Release, spawned, worker

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


def told_until(daemon: Protector, event: str) -> tuple[list[str], list[str]]:
    """The log before and after a line."""
    at = next(n for n, line in enumerate(daemon.log.seen) if f"event={event}" in line)
    return daemon.log.seen[:at], daemon.log.seen[at:]


def test_a_crash_loop_is_a_few_lines_and_a_count(
    looping: Callable[..., Protector], tmp_path: Path
) -> None:
    daemon = looping()
    eventually(lambda: starts(tmp_path) >= WORKERS * (SHOWN + 3), "a crash loop")
    daemon.stop()

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


def test_at_level_debug_all_of_it_is_told(
    looping: Callable[..., Protector], tmp_path: Path
) -> None:
    daemon = looping("--verbose")
    eventually(lambda: starts(tmp_path) >= WORKERS * (SHOWN + 2), "a crash loop")
    daemon.stop()

    assert daemon.log.count("event=crash-loop") == 0
    assert daemon.log.count("event=exited .*worker=") == starts(tmp_path) + WORKERS
