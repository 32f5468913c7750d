"""sd_notify, both ways, over real sockets."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from socketprotector.system.sd_notify import NotifySocket, Outbox, Systemd, parse

STRANGERS = frozenset({54_321})  # no user has that number
OURS = frozenset({os.getuid()})


@pytest.fixture
def started() -> Iterator[Callable[..., Systemd]]:
    """Start a Systemd with an environment; what it wants to do later is never done."""
    outboxes: list[Outbox] = []

    def start(environment: dict[str, str]) -> Systemd:
        address = environment.get("NOTIFY_SOCKET", "")
        outboxes.append(Outbox(lambda _: None, address=address))
        return Systemd(environment, os.getpid(), outboxes[-1])

    yield start
    for each in outboxes:
        each.close()


@pytest.fixture
def notify() -> Iterator[NotifySocket]:
    made = NotifySocket.make("@socketprotector-test-" + os.urandom(8).hex(), OURS)
    yield made
    made.close()


def send(to: NotifySocket, message: bytes, *descriptors: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        sender.sendmsg([message], rights if descriptors else [], 0, "\0" + to.address[1:])


def heard(notify: NotifySocket, pid: int = 1) -> dict[str, str] | None:
    """The next message, which is taken."""
    found = notify.peek(pid)
    if found is None:
        return None
    notify.remove()
    return dict(found)


def test_last_words_wait_for_room_without_spinning_and_go_when_there_is_some() -> None:
    attempts = 0

    class Counted(Outbox):
        def _flush(self) -> None:
            nonlocal attempts
            attempts += 1
            super()._flush()

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = "@socketprotector-test-" + os.urandom(8).hex()
        manager.bind("\0" + address[1:])
        outbox = Counted(lambda _: None, address=address)
        filled = 0
        while not outbox.waiting:
            filled += 1
            outbox.send(f"STATUS={filled}")
        reading = threading.Timer(0.3, lambda: [manager.recv(64) for _ in range(filled)])
        reading.start()
        attempts = 0

        outbox.finish(10)

        reading.join()
    assert attempts < 10


def test_messages_come_in_order_and_then_there_is_none(notify: NotifySocket) -> None:
    send(notify, b"READY=1\nSTATUS=well")
    send(notify, b"STATUS=better")

    assert heard(notify) == {"READY": "1", "STATUS": "well"}
    assert heard(notify) == {"STATUS": "better"}
    assert heard(notify) is None


def test_a_message_stays_until_it_is_taken(notify: NotifySocket) -> None:
    send(notify, b"READY=1", 0)  # a descriptor is made only then: the fixture compares

    assert notify.peek(1) == notify.peek(1) == {"READY": "1"}
    notify.remove()
    assert notify.peek(1) is None


def test_messages_of_neither_the_worker_nor_a_known_user_are_ignored() -> None:
    notify = NotifySocket.make("@socketprotector-test-" + os.urandom(8).hex(), STRANGERS)
    send(notify, b"READY=1")
    send(notify, b"READY=1")

    assert heard(notify) == {}
    assert heard(notify, os.getpid()) == {"READY": "1"}  # the worker, whatever its user
    notify.close()


def test_a_barriers_descriptor_is_closed_when_its_message_is_taken(notify: NotifySocket) -> None:
    waits, barrier = socket.socketpair()
    with waits:
        send(notify, b"BARRIER=1", barrier.fileno())
        barrier.close()

        notify.peek(1)
        with pytest.raises(BlockingIOError):
            waits.recv(1, socket.MSG_DONTWAIT)
        notify.remove()
        assert waits.recv(1, socket.MSG_DONTWAIT) == b""


@pytest.mark.parametrize("count", [1, 2, 253])
@pytest.mark.parametrize("message", [b"READY=1", b"", b"BARRIER=2", b"FDSTORE=1"])
def test_foreign_descriptors_are_closed(notify: NotifySocket, message: bytes, count: int) -> None:
    send(notify, message, *[0] * count)  # and the fixture compares

    assert heard(notify) is not None


def test_a_strangers_barrier_is_closed() -> None:
    notify = NotifySocket.make("@socketprotector-test-" + os.urandom(8).hex(), STRANGERS)
    send(notify, b"BARRIER=1", 0)

    assert heard(notify) == {}
    notify.close()


def test_what_is_no_assignment_is_passed_over() -> None:
    assert parse(b"READY=1\n\nnonsense\n=x\nA=b=c\n\xff=\xfe") == {
        "READY": "1",
        "A": "b=c",
        "\ufffd": "\ufffd",
    }


def test_a_c_string_may_be_sent_with_its_final_nul_byte() -> None:
    assert parse(b"READY=1\0") == {"READY": "1"}
    assert parse(b"READY=1\n\0") == {"READY": "1"}
    assert parse(b"READY=1\0\0") == {"READY": "1\0"}
    assert parse(b"\0") == {}


def test_a_long_message_is_cut(notify: NotifySocket) -> None:
    send(notify, b"READY=1\nSTATUS=" + b"x" * 50_000)

    message = heard(notify)

    assert message is not None
    assert message["READY"] == "1"
    assert len(message["STATUS"]) < 5000


# -- towards systemd ------------------------------------------------------------------------


def test_systemd_hears_what_is_said(tmp_path: Path, started: Callable[..., Systemd]) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        systemd = started({"NOTIFY_SOCKET": path})

        systemd.send(READY="1", STATUS="serves")
        systemd.reloading()

        assert manager.recv(4096) == b"READY=1\nSTATUS=serves"
        said = dict(line.split("=") for line in manager.recv(4096).decode().split("\n"))
        assert said.pop("MONOTONIC_USEC").isdigit()
        assert said == {"RELOADING": "1", "STATUS": "reloading"}


def test_a_long_status_takes_no_ready_along(
    notify: NotifySocket, started: Callable[..., Systemd]
) -> None:
    """systemd ignores a longer datagram whole; a byte that is not UTF-8 becomes six."""
    started({"NOTIFY_SOCKET": notify.address}).send(READY="1", STATUS="\udcff" * 5000)

    message = notify.socket.recv(100_000)
    assert message.startswith(b"READY=1\n")
    assert len(message) <= 4096


def test_an_abstract_address_will_do(notify: NotifySocket, started: Callable[..., Systemd]) -> None:
    started({"NOTIFY_SOCKET": notify.address}).send(READY="1")

    assert heard(notify) == {"READY": "1"}


def test_a_missing_receiver_or_one_that_does_not_read_holds_nothing_up(
    tmp_path: Path, started: Callable[..., Systemd]
) -> None:
    started({}).send(READY="1")
    started({"NOTIFY_SOCKET": str(tmp_path / "nowhere")}).send(READY="1")
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        systemd = started({"NOTIFY_SOCKET": path})
        for _ in range(2000):
            systemd.send(STATUS="x")


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "4000000"}, 2.0),
        ({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": str(os.getpid())}, 2.0),
        ({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "never"}, 0.0),
        ({"WATCHDOG_USEC": "\u00b2"}, 0.0),
        ({}, 0.0),
    ],
)
def test_the_watchdog_is_fed_in_half_its_time(
    environment: dict[str, str], watchdog_s: float, started: Callable[..., Systemd]
) -> None:
    assert started({"NOTIFY_SOCKET": "@x", **environment}).watchdog_s == watchdog_s
    assert started(environment).watchdog_s == 0.0
