"""The state as one value: the next program reads what the previous program has written."""

from __future__ import annotations

from socketprotector.core.actions import (
    Report,
    ReportKind,
    Retire,
    Signal,
    UseSettings,
    WorkerSignal,
)
from socketprotector.core.events import Deadline, TimerKind
from socketprotector.core.snapshot import CODEC, Snapshot
from socketprotector.model.records import DeliveryRecord, ForwarderRecord, SettingsRecord
from socketprotector.model.settings import Settings
from tests.unit.conftest import Story

SETTINGS = SettingsRecord(Settings("name", ("sh",), "/"))


def test_the_next_program_reads_the_whole_state(story: Story) -> None:
    fleet = story.given_serving(workers=2).fleet
    snapshot = Snapshot(
        fleet,
        SETTINGS,
        unfinished=(Signal(1, WorkerSignal.TERM), Retire(2), UseSettings()),
        timers=((Deadline(TimerKind.WORKER_KILL, 1), 5.0),),
        orders=(("@worker-1", 15),),
        unsaid=(Report(ReportKind.READY, 1),),
    )

    assert CODEC.decode(CODEC.encode(snapshot)) == snapshot


def test_the_next_delivery_gets_its_own_records(story: Story) -> None:
    forwarder = ForwarderRecord()
    snapshot = Snapshot(story.fleet, SETTINGS, forwarder=forwarder, nonblocking=(3, 4))

    assert snapshot.delivery == DeliveryRecord(forwarder, nonblocking=(3, 4))
