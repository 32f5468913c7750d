"""News to the protector: one datagram, whatever the state of the receiver."""

from __future__ import annotations

import os
import resource
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from socketprotector_client import notify, sd_notify, wire

from tests.pages import page
from tests.running import DEADLINE_S, ROOT, eventually


@pytest.fixture(autouse=True)
def _lets_go_of_its_socket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = len(os.listdir("/proc/self/task"))
    yield
    # A thread of the test before may have been about to end.
    eventually(lambda: len(os.listdir("/proc/self/task")) <= threads, "nothing waits any more")
    sd_notify._sender(os.environ.get(wire.ENV_NOTIFY, "")).close()


def fill() -> int:
    """Say so much that there is no room left; the last one is late, and has the same name."""
    said = 0
    while notify(FILLS=said):
        said += 1
    return said


def heard(receiver: socket.socket) -> list[str]:
    """All messages until READY=1, without those that only fill the queue."""
    receiver.settimeout(DEADLINE_S)
    found: list[str] = []
    while not (found and "READY=1" in found[-1]):
        found.append(receiver.recv(4096).decode())
    return [each for each in found if not each.startswith("FILLS=")]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind("")
        monkeypatch.setenv(wire.ENV_NOTIFY, "@" + one.getsockname()[1:].decode())
        yield one


def test_lines_and_fields_travel_in_one_datagram(receiver: socket.socket) -> None:
    assert notify("READY=1", wire.RETIRES_ON_RETURN, status="warm", errno=None, watchdog=1)

    assert receiver.recv(4096) == (b"READY=1\nX_SOCKETPROTECTOR_RETIRE=1\nSTATUS=warm\nWATCHDOG=1")


def test_a_worker_that_retires_says_what_the_document_shows(receiver: socket.socket) -> None:
    [shown] = [each for each in page.blocks(ROOT / "docs/protocol.md") if each.kind == "message"]
    assert notify("READY=1", wire.RETIRES_ON_RETURN)

    assert receiver.recv(4096).decode() == shown.text.strip()


def test_a_line_end_in_a_value_does_not_make_another_assignment(receiver: socket.socket) -> None:
    assert notify(status="half\nREADY=1")

    assert receiver.recv(4096) == b"STATUS=half READY=1"


def test_a_path_works_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "notify")
    monkeypatch.setenv(wire.ENV_NOTIFY, path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path)

        assert notify("STOPPING=1")

        assert receiver.recv(4096) == b"STOPPING=1"


def test_a_full_receiver_neither_blocks_nor_fails(receiver: socket.socket) -> None:
    assert fill() > 0
    assert not notify("READY=1")
    receiver.close()  # else it would be waited for


def test_what_finds_no_room_is_heard_once_there_is(receiver: socket.socket) -> None:
    fill()
    assert not notify("EXTEND_TIMEOUT_USEC=5000000")
    assert not notify("READY=1", wire.RETIRES_ON_RETURN)

    ready = f"READY=1\n{wire.RETIRES_ON_RETURN}"
    assert heard(receiver) == ["EXTEND_TIMEOUT_USEC=5000000", ready]


def test_of_what_waits_only_the_newest_value_is_heard(receiver: socket.socket) -> None:
    fill()
    for number in range(100):
        notify(status=number)
    notify("READY=1")

    assert heard(receiver) == ["STATUS=99", "READY=1"]


def test_a_forked_child_does_not_say_what_its_parent_waits_to_say(receiver: socket.socket) -> None:
    said = fill()
    notify(status="the parent")
    child = os.fork()
    if child == 0:
        notify("READY=1", who="the child")
        eventually(lambda: len(os.listdir("/proc/self/task")) == 1, "the child has said it")
        os._exit(0)
    receiver.settimeout(DEADLINE_S)
    found = [receiver.recv(4096).decode() for _ in range(said + 3)]
    os.waitpid(child, 0)

    assert found.count("STATUS=the parent") == 1
    assert found.count("READY=1\nWHO=the child") == 1
    assert not select.select([receiver], [], [], 0)[0]


def test_it_is_heard_when_no_descriptor_is_left(receiver: socket.socket) -> None:
    assert notify(status="well")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        assert notify(watchdog=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [receiver.recv(99) for _ in range(2)] == [b"STATUS=well", b"WATCHDOG=1"]


def test_it_is_heard_when_the_path_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    monkeypatch.setenv(wire.ENV_NOTIFY, str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        assert notify(status="well")
        path.unlink()

        assert notify(watchdog=1)
        assert [receiver.recv(99) for _ in range(2)] == [b"STATUS=well", b"WATCHDOG=1"]


def test_a_new_receiver_at_the_same_path_is_notified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notify"
    monkeypatch.setenv(wire.ENV_NOTIFY, str(path))
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(str(path))
            assert notify("READY=1")
            assert receiver.recv(99) == b"READY=1"
        assert not notify("STATUS=not heard")
        path.unlink()


def test_a_vanished_receiver_neither_blocks_nor_fails(receiver: socket.socket) -> None:
    receiver.close()

    assert not notify("READY=1")


@pytest.mark.parametrize("address", [None, "", "vsock:2:1", "relative"])
def test_without_a_receiver_it_does_nothing(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(wire.ENV_NOTIFY, raising=False)
    if address is not None:
        monkeypatch.setenv(wire.ENV_NOTIFY, address)

    assert not notify("READY=1")
