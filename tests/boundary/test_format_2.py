"""What programs of format 2 have written is read whole: the state, and the settings at its start.

The files were written once by such a program; format2/how_made.txt says how, and what is in them.
Each field in there has another value than its default, so one that got lost would show.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from socketprotector.core.events import (
    Deadline,
    Retire,
    Signal,
    TimerKind,
    UseSettings,
    WorkerSignal,
)
from socketprotector.core.fleet import (
    Candidate,
    Fleet,
    Generation,
    Next,
    Phase,
    Policy,
    State,
    Stop,
    Worker,
)
from socketprotector.core.snapshot import CODEC, Snapshot
from socketprotector.daemon import checkpoint
from socketprotector.model.history import Crash, History, Reload
from socketprotector.model.records import (
    Counts,
    ForwarderRecord,
    GenerationRecord,
    Program,
    RunRecord,
    SettingsRecord,
    SteeringRecord,
    WorkerRecord,
)
from socketprotector.model.settings import (
    Identity,
    Limits,
    ListenerSettings,
    Origin,
    Settings,
    load,
)
from socketprotector.system.state_file import StateFile

WRITTEN = Path(__file__).parent / "format2"

IDENTITY = Identity("web", 33, 34, (34, 35), "/var/www", "/bin/sh")
POLICY = Policy(4, 61.0, 1.5, 62.0, 5, 31.0, 6.0, True, True, "any")
SETTINGS = Settings(
    name="shop",
    command=("/srv/shop", "--fast"),
    directory="/srv",
    listeners=(
        ListenerSettings("tcp:127.0.0.1:8000", 1, 2, 128, True, "[::]:8000", True, 3, "web", True),
        ListenerSettings("unix:/run/shop", 8, 9),
    ),
    policy=POLICY,
    handoff="listener",
    shell=True,
    pools=2,
    drain_signal=3,
    workers=4,
    ready="any",
    ready_after_s=2.5,
    ready_fd=7,
    ready_check="true",
    queue=99,
    busy_poll_s=0.5,
    identity=IDENTITY,
    worker_identity=replace(IDENTITY, user="worker"),
    no_new_privileges=True,
    umask=0o27,
    nofile_soft=4096,
    limits=(("nofile", 10), ("core", 0)),
    nice=5,
    keep_env=("PATH", "HOME"),
    batch=True,
    environment=(("A", "1"), ("B", "2")),
    env_file="/etc/shop.env",
    pid_file="/run/shop.pid",
    log_file="/var/log/shop",
    log_level="debug",
    log_format="json",
    log_relay=False,
    log_prefix=True,
    watch=("/srv/app",),
    foreground=True,
    guarded=True,
    outlives_terminal=True,
    watchdog_s=9.5,
    worker_limits=Limits(100, 10, 1 << 30, 3600.0),
    control=ListenerSettings("unix:/run/shop.ctl", 5, 6),
    control_group=50,
    secret="abc",
    notify_folder="/run/shop.notify",
    notices=("mind the gap",),
    origin=Origin(("--config", "shop.toml"), "/home", 0o77, True),
)
PROGRAM = Program(
    path="/srv/shop",
    argv=("shop", "--fast"),
    directory="/srv",
    environment=(("A", "1"),),
    umask=0o27,
    limits=(("nofile", 10),),
    nice=5,
    identity=IDENTITY,
    batch=True,
    listeners="0:tcp:127.0.0.1:8000",
    handoff="listener",
    ready="any",
    ready_after_s=2.5,
    ready_fd=7,
    ready_check="true",
    drain_signal=3,
    watchdog_s=9.5,
)
FLEET = Fleet(
    policy=POLICY,
    workers_wanted=3,
    generations=(
        Generation(
            6,
            Phase.DRAINING,
            False,
            True,
            True,
            (Worker(20, 0, State.RETIRING, True, 2, 19, True), Worker(21, 1, State.ORPHANED)),
        ),
        Generation(7, Phase.SERVING, workers=(Worker(22, 0, State.READY), Worker(23, 1))),
    ),
    next_generation=8,
    next_worker=24,
    reload_wanted=True,
    stopping=Stop.GRACEFUL,
    to_open=Next.LAST_GOOD,
    configured=True,
    reading=True,
    candidate=Candidate(replace(POLICY, ready="fd"), 5),
    served=True,
    failed_starts=1,
    listeners_open=False,
    held=True,
    exit_status=3,
    timers=frozenset({Deadline(TimerKind.HOLD), Deadline(TimerKind.DRAIN, 6)}),
)
SNAPSHOT = Snapshot(
    fleet=FLEET,
    generations=(
        GenerationRecord(
            number=6,
            program=PROGRAM,
            serving_since=1.5,
            ended=True,
            opened_at=2.5,
            served_at=3.5,
            drained_at=4.5,
            past=Counts(10, 2, 1, tuple(range(len(Counts().waits)))),
            lost=7,
            socket_number=1,
        ),
        GenerationRecord(7, replace(PROGRAM, nice=0), 5.5),
        GenerationRecord(5, PROGRAM, released=True),
    ),
    workers=(
        WorkerRecord(
            number=20,
            generation=6,
            pid=1020,
            output_start=46,
            ready_at=1.25,
            started_at=2.25,
            watched=True,
            status="busy",
            aborted=True,
            ready_by="notify",
            killed=True,
        ),
        WorkerRecord(21, 6, 1021, -1, slot=1, orphaned=True),
        WorkerRecord(22, 7, 1022, 45),
    ),
    last_good=PROGRAM,
    timers=((Deadline(TimerKind.HOLD), 100.5), (Deadline(TimerKind.DRAIN, 6), 200.5)),
    # What counted settings that had come to be used said that this was still to be done.
    unfinished=(Signal(20, WorkerSignal.TERM), Retire(21), UseSettings()),
    orphans=("@a", "@b"),
    forwarder=ForwarderRecord(
        forwarded=1000,
        lost=2,
        pending=b"\x04",
        number=9,
        parked=((7, b"\x02aside"), (8, b"\x03")),
    ),
    steering=SteeringRecord(socket_number=0, unserved=((7, 1),)),
    nonblocking=(1, 2),
    settings=SettingsRecord(SETTINGS, replace(SETTINGS, workers=5)),
    run=RunRecord(
        started_at=4.5,
        restarts=3,
        history=History(
            (Reload(6, "failed", "why", 1.5, 2.5), Reload(7)),
            (Crash(3.5, 6, 18, 1, 1018, "killed by KILL", "serving", 4, "last", 0.5, 600),),
            11,
        ),
    ),
    log_level="debug",
    version="0.0",
)


@pytest.fixture
def old_state() -> Iterator[int]:
    fd = os.memfd_create("state")
    os.write(fd, (WRITTEN / "state").read_bytes())
    yield fd
    os.close(fd)


def test_a_state_is_read_whole_with_all_that_is_called_or_arranged_otherwise_now(
    old_state: int,
) -> None:
    found = checkpoint.read(old_state)

    assert found is not None
    for each in fields(Snapshot):  # one by one, so that a difference is short
        assert getattr(found, each.name) == getattr(SNAPSHOT, each.name), each.name
    StateFile(old_state).write(CODEC.encode(found))
    assert checkpoint.read(old_state) == found


def test_the_settings_at_the_start_are_read_whole() -> None:
    assert load((WRITTEN / "settings").read_bytes()) == SETTINGS
