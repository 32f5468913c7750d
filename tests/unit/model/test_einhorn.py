"""Which lines are einhorn's ACK."""

from __future__ import annotations

import pytest

from socketprotector.model.einhorn import ACK_BYTES, ack

JSON = b'{"command":"worker:ack","pid":%d}'


@pytest.mark.parametrize(
    "line",
    [
        JSON % 7,
        b'{"pid":7, "more":[1], "command":"worker:ack"}',
        b"---%0A:command: worker:ack%0A:pid: 7%0A",
        b"---%0Acommand: worker:ack%0Apid: 7",
        b'--- %0A"command": "worker:ack"%0A\'pid\': 7',
        b"  :command:   'worker:ack'  %0A%0A%0A  :pid:  7 ",
    ],
)
def test_its_pid_is_read(line: bytes) -> None:
    assert ack(line) == 7


@pytest.mark.parametrize(
    "line",
    [
        b'{"command":"worker:ack"}',
        b'{"command":"worker:ack","pid":-1}',
        b'{"command":"worker:ack","pid":true}',
        b"command: worker:ack%0Apid: many",
        b"command: worker:ack%0Apid: 12345678901",
    ],
)
def test_one_without_a_pid_counts_for_no_process_in_particular(line: bytes) -> None:
    assert ack(line) == 0


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"worker:ack",
        b'["worker:ack"]',
        b'{"v":1,"command":"status","id":"worker:ack"}',
        b"command: no worker:ack",
        b"[" * 400 + b"worker:ack",
        b"\xff: worker:ack",
    ],
)
def test_no_other_line_is_one(line: bytes) -> None:
    assert ack(line) is None


def test_a_long_line_is_none() -> None:
    line = JSON % 7
    assert ack(line.ljust(ACK_BYTES)) == 7
    assert ack(line.ljust(ACK_BYTES + 1)) is None
