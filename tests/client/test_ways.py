"""What holds for each way to get connections, with and without a protector."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from socketprotector_client import wire

from tests.channel import Channel, name
from tests.procfs import ports_of, sleeps, wake_ups
from tests.running import eventually

SERVING = ["iterates.py", "serves.py", "streams.py"]
LISTENERS = ["asyncio_server.py", "threading_server.py"]

every_way = pytest.mark.parametrize("program", [*SERVING, *LISTENERS])


@every_way
def test_a_worker_answers_what_the_protector_hands_off(channel: Channel, program: str) -> None:
    worker = channel.start(program)

    clients = [channel.connect() for _ in range(3)]

    assert [client.ask("hello") for client in clients] == ["echo hello"] * 3
    assert {client.ask("pid") for client in clients} == {str(worker.pid)}


@every_way
def test_ready_and_retire_are_said_in_one_datagram_before_any_connection(
    channel: Channel, program: str
) -> None:
    worker = channel.start(program)

    assert worker.ready_lines == ["READY=1", wire.RETIRES_ON_RETURN]


@every_way
def test_connections_queued_before_the_start_are_answered(channel: Channel, program: str) -> None:
    clients = [channel.connect() for _ in range(3)]

    channel.start(program)

    assert [client.ask("hello") for client in clients] == ["echo hello"] * 3


@every_way
def test_a_connection_knows_its_listener(channel: Channel, program: str, tmp_path: Path) -> None:
    channel.listen_unix(tmp_path / "socket")
    channel.start(program)

    over_tcp, over_unix = channel.connect(0), channel.connect(1)

    assert over_tcp.ask("listener") == name(channel.listeners[0])
    assert over_unix.ask("listener") == f"unix:{tmp_path}/socket"


@every_way
def test_the_end_of_the_channel_lets_what_is_queued_and_served_be_finished(
    channel: Channel, program: str
) -> None:
    worker = channel.start(program)
    served = channel.connect()
    assert served.ask("hello") == "echo hello"

    queued = channel.connect()
    channel.end_channel()

    assert queued.ask("hello") == "echo hello"
    assert served.ask("draining") == "True"
    served.close()
    queued.close()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)


@every_way
def test_the_end_of_its_return_line_retires_one_worker_and_leaves_the_queue(
    channel: Channel, program: str
) -> None:
    worker = channel.start(program)
    served = channel.connect()
    assert served.ask("hello") == "echo hello"

    worker.retire()
    eventually(lambda: served.ask("draining") == "True", "the worker notices")
    served.close()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)

    queued = channel.connect()
    other = channel.start(program)
    assert queued.ask("pid") == str(other.pid)


@pytest.mark.parametrize("alone", [False, True], ids=["protected", "alone"])
@pytest.mark.parametrize("program", SERVING)
def test_sigterm_lets_what_is_served_be_finished(
    channel: Channel, program: str, alone: bool, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    worker = channel.start(program, "--address", f"unix:{path}", alone=alone)
    served = channel.client(str(path)) if alone else channel.connect()
    assert served.ask("hello") == "echo hello"

    worker.term()

    eventually(lambda: served.ask("draining") == "True", "the worker notices")
    served.close()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)
    if not alone:
        channel.connect()
        assert channel.queued() == 1


@pytest.mark.parametrize("program", [*SERVING, "threading_server.py"])
def test_an_idle_worker_ends_at_once(channel: Channel, program: str) -> None:
    worker = channel.start(program)

    channel.end_channel()

    assert (worker.read_last(), worker.wait()) == ("ended", 0)


@every_way
def test_without_a_protector_it_listens_itself(
    channel: Channel, program: str, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    worker = channel.start(program, "--address", f"unix:{path}", alone=True)

    client = channel.client(str(path))

    assert client.ask("listener") == f"unix:{path}"
    assert client.ask("pid") == str(worker.pid)
    assert worker.ready_lines == ["READY=1"]


@every_way
def test_without_a_protector_a_port_means_both_address_families(
    channel: Channel, program: str
) -> None:
    worker = channel.start(program, "--address", "0", alone=True)
    ports = ports_of(worker.pid)

    assert ports == [ports[0]] * len(ports)
    client = channel.client(("127.0.0.1", ports[0]))
    assert client.ask("listener") == f"tcp:0.0.0.0:{ports[0]}"
    if len(ports) == 2:
        client = channel.client(("::1", ports[0]))
        assert client.ask("listener") == f"tcp:[::]:{ports[0]}"


@every_way
def test_without_a_protector_and_without_an_address_it_says_so(
    channel: Channel, program: str
) -> None:
    worker = channel.spawn(program, alone=True)

    assert worker.wait() == 1
    assert "no protector and no address was given" in channel.log.read_text()


@every_way
def test_the_limit_leaves_further_connections_in_the_queue(channel: Channel, program: str) -> None:
    channel.start(program, "--limit", "2")
    clients = [channel.connect() for _ in range(4)]
    assert [client.ask("hello") for client in clients[:2]] == ["echo hello"] * 2

    for client in clients[2:]:
        client.say("late")
    assert channel.queued() == 2

    clients[0].close()
    assert clients[2].hear() == "echo late"
    assert channel.queued() == 1
    assert not clients[3].has_answer()


@every_way
def test_connections_that_end_while_the_limit_is_reached_wake_the_worker(
    channel: Channel, program: str
) -> None:
    channel.start(program, "--limit", "2", "--threads", "8", "--hectic")

    for _ in range(30):
        clients = [channel.connect() for _ in range(10)]
        for client in clients:
            client.say("hello")
        for client in clients:
            assert client.hear() == "echo hello"
            client.close()


def test_a_connection_can_be_passed_to_a_process_of_multiprocessing(channel: Channel) -> None:
    worker = channel.start("passes.py")
    client = channel.connect()

    pid, *known = client.hear().split()
    assert pid != str(worker.pid)
    assert known == [name(channel.listeners[0]), str(client.socket.getsockname()[1])]
    channel.end_channel()
    assert worker.wait() == 0


@pytest.mark.parametrize("program", ["serves.py", "streams.py"])
def test_a_handler_that_fails_is_logged_and_harms_no_other_client(
    channel: Channel, program: str
) -> None:
    channel.start(program)
    other = channel.connect()
    assert other.ask("hello") == "echo hello"

    failing = channel.connect()

    assert failing.ask("fail") == ""
    assert other.ask("hello") == "echo hello"
    assert channel.connect().ask("hello") == "echo hello"
    eventually(lambda: "RuntimeError: asked to fail" in channel.log.read_text(), "the log")


@pytest.mark.parametrize("program", [*SERVING, "threading_server.py"])
def test_a_program_that_asked_is_told_once_when_the_drain_begins(
    channel: Channel, program: str
) -> None:
    worker = channel.start(program, "--announce")
    client = channel.connect()
    assert client.ask("hello") == "echo hello"

    channel.end_channel()

    lines = [worker.read_line()]
    client.close()
    lines += worker.read_rest()
    assert lines.count("drain begun") == 1
    assert lines[-1] == "ended"


@every_way
def test_a_worker_at_its_limit_does_not_spin(channel: Channel, program: str) -> None:
    worker = channel.start(program, "--limit", "1")
    client = channel.connect()
    channel.connect()
    for _ in range(20):
        assert client.ask("hello") == "echo hello"

    eventually(lambda: sleeps(worker.pid), "sleep")
    assert not client.has_answer()


@every_way
def test_a_draining_worker_does_not_spin(channel: Channel, program: str) -> None:
    worker = channel.start(program)
    client = channel.connect()
    assert client.ask("hello") == "echo hello"
    eventually(lambda: sleeps(worker.pid), "sleep")
    before = wake_ups(worker.pid)

    channel.end_channel()

    # Fewer, where threads have ended.
    eventually(lambda: wake_ups(worker.pid) != before, "that it has noticed")
    eventually(lambda: sleeps(worker.pid), "sleep again")
    assert not client.has_answer()


@every_way
def test_a_client_that_resets_while_queued_does_no_harm(channel: Channel, program: str) -> None:
    gone = channel.connect()
    gone.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    gone.close()
    waiting = channel.connect()

    channel.start(program)

    assert waiting.ask("hello") == "echo hello"


@every_way
def test_a_message_of_another_version_is_refused_in_clear_words(
    channel: Channel, program: str
) -> None:
    channel.start(program)
    refused = channel.connect_only()

    channel.hand_off(version=2)

    assert refused.hear() == ""
    eventually(lambda: "cannot read a message of version 2" in channel.log.read_text(), "the log")


@pytest.mark.parametrize("program", SERVING)
def test_a_message_of_another_version_ends_the_program_after_its_last_client(
    channel: Channel, program: str
) -> None:
    worker = channel.start(program)
    client = channel.connect()
    assert client.ask("hello") == "echo hello"
    channel.connect_only()

    channel.hand_off(version=2)

    assert client.ask("hello") == "echo hello"
    client.close()
    assert worker.wait() == 1
    assert "ProtocolError: cannot read a message of version 2" in channel.log.read_text()


@every_way
def test_a_returned_connection_is_refused_and_the_next_one_served(
    channel: Channel, program: str
) -> None:
    channel.start(program)
    returned = channel.connect_only()

    channel.hand_off(kind=wire.KIND_RETURNED, state=b"mid-stream")

    assert returned.hear() == ""
    assert channel.connect().ask("hello") == "echo hello"


@pytest.mark.parametrize("other", ["thread", "fork"])
def test_threads_that_use_the_library_first_at_once_share_all_of_it(
    channel: Channel, other: str
) -> None:
    worker = channel.spawn("first_use.py", other, alone=True)

    assert worker.read_rest() == ["made: 1", "ended"]
