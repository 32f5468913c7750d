"""What holds for each way to get connections, with and without a protector."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from socketprotector_client import wire

from tests.client.protector import Protector, name, ports_of, until

SERVING = ["iterates.py", "serves.py", "streams.py"]
LISTENERS = ["asyncio_server.py", "threading_server.py"]

every_way = pytest.mark.parametrize("program", [*SERVING, *LISTENERS])


@every_way
def test_a_worker_answers_what_the_protector_hands_off(protector: Protector, program: str) -> None:
    worker = protector.start(program)

    clients = [protector.connect() for _ in range(3)]

    assert [client.ask("hello") for client in clients] == ["echo hello"] * 3
    assert {client.ask("pid") for client in clients} == {str(worker.pid)}


@every_way
def test_ready_and_retire_are_said_in_one_datagram_before_any_connection(
    protector: Protector, program: str
) -> None:
    worker = protector.start(program)

    assert worker.ready_lines == ["READY=1", wire.RETIRES_ON_RETURN]


@every_way
def test_connections_queued_before_the_start_are_answered(
    protector: Protector, program: str
) -> None:
    clients = [protector.connect() for _ in range(3)]

    protector.start(program)

    assert [client.ask("hello") for client in clients] == ["echo hello"] * 3


@every_way
def test_a_connection_knows_its_listener(
    protector: Protector, program: str, tmp_path: Path
) -> None:
    protector.listen_unix(tmp_path / "socket")
    protector.start(program)

    over_tcp, over_unix = protector.connect(0), protector.connect(1)

    assert over_tcp.ask("listener") == name(protector.listeners[0])
    assert over_unix.ask("listener") == f"unix:{tmp_path}/socket"


@every_way
def test_the_end_of_the_channel_lets_what_is_queued_and_served_be_finished(
    protector: Protector, program: str
) -> None:
    worker = protector.start(program)
    served = protector.connect()
    assert served.ask("hello") == "echo hello"

    queued = protector.connect()
    protector.end_channel()

    assert queued.ask("hello") == "echo hello"
    assert served.ask("draining") == "True"
    served.close()
    queued.close()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)


@every_way
def test_the_end_of_its_return_line_retires_one_worker_and_leaves_the_queue(
    protector: Protector, program: str
) -> None:
    worker = protector.start(program)
    served = protector.connect()
    assert served.ask("hello") == "echo hello"

    worker.retire()
    until(lambda: served.ask("draining") == "True", "the worker notices")
    served.close()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)

    queued = protector.connect()
    other = protector.start(program)
    assert queued.ask("pid") == str(other.pid)


@pytest.mark.parametrize("alone", [False, True], ids=["protected", "alone"])
@pytest.mark.parametrize("program", SERVING)
def test_sigterm_lets_what_is_served_be_finished(
    protector: Protector, program: str, alone: bool, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    worker = protector.start(program, "--address", f"unix:{path}", alone=alone)
    served = protector.client(socket.AF_UNIX, str(path)) if alone else protector.connect()
    assert served.ask("hello") == "echo hello"

    worker.term()

    until(lambda: served.ask("draining") == "True", "the worker notices")
    served.close()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)
    if not alone:
        protector.connect()
        assert protector.queued() == 1


@pytest.mark.parametrize("program", [*SERVING, "threading_server.py"])
def test_an_idle_worker_ends_at_once(protector: Protector, program: str) -> None:
    worker = protector.start(program)

    protector.end_channel()

    assert (worker.read_last(), worker.wait()) == ("ended", 0)


@every_way
def test_without_a_protector_it_listens_itself(
    protector: Protector, program: str, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    worker = protector.start(program, "--address", f"unix:{path}", alone=True)

    client = protector.client(socket.AF_UNIX, str(path))

    assert client.ask("listener") == f"unix:{path}"
    assert client.ask("pid") == str(worker.pid)
    assert worker.ready_lines == ["READY=1"]


@every_way
def test_without_a_protector_a_port_means_both_address_families(
    protector: Protector, program: str
) -> None:
    worker = protector.start(program, "--address", "0", alone=True)
    ports = ports_of(worker.pid)

    assert ports == [ports[0]] * len(ports)
    client = protector.client(socket.AF_INET, ("127.0.0.1", ports[0]))
    assert client.ask("listener") == f"tcp:0.0.0.0:{ports[0]}"
    if len(ports) == 2:
        client = protector.client(socket.AF_INET6, ("::1", ports[0]))
        assert client.ask("listener") == f"tcp:[::]:{ports[0]}"


@every_way
def test_without_a_protector_and_without_an_address_it_says_so(
    protector: Protector, program: str
) -> None:
    worker = protector.spawn(program, alone=True)

    assert worker.wait() == 1
    assert "no protector and no address was given" in protector.log.read_text()


@every_way
def test_the_limit_leaves_further_connections_in_the_queue(
    protector: Protector, program: str
) -> None:
    protector.start(program, "--limit", "2")
    clients = [protector.connect() for _ in range(4)]
    assert [client.ask("hello") for client in clients[:2]] == ["echo hello"] * 2

    for client in clients[2:]:
        client.send("late")
    assert protector.queued() == 2

    clients[0].close()
    assert clients[2].read() == "echo late"
    assert protector.queued() == 1
    assert not clients[3].has_answer()


@every_way
def test_connections_that_end_while_the_limit_is_reached_wake_the_worker(
    protector: Protector, program: str
) -> None:
    protector.start(program, "--limit", "2", "--threads", "8", "--hectic")

    for _ in range(30):
        clients = [protector.connect() for _ in range(10)]
        for client in clients:
            client.send("hello")
        for client in clients:
            assert client.read() == "echo hello"
            client.close()


@pytest.mark.parametrize("program", ["serves.py", "streams.py"])
def test_a_handler_that_fails_is_logged_and_harms_nobody_else(
    protector: Protector, program: str
) -> None:
    protector.start(program)
    other = protector.connect()
    assert other.ask("hello") == "echo hello"

    failing = protector.connect()

    assert failing.ask("fail") == ""
    assert other.ask("hello") == "echo hello"
    assert protector.connect().ask("hello") == "echo hello"
    until(lambda: "RuntimeError: asked to fail" in protector.log.read_text(), "the log")


@pytest.mark.parametrize("program", [*SERVING, "threading_server.py"])
def test_whoever_asked_is_told_once_when_the_drain_begins(
    protector: Protector, program: str
) -> None:
    worker = protector.start(program, "--announce")
    client = protector.connect()
    assert client.ask("hello") == "echo hello"

    protector.end_channel()

    lines = [worker.read_line()]
    client.close()
    lines += worker.read_rest()
    assert lines.count("drain begun") == 1
    assert lines[-1] == "ended"


@every_way
def test_a_worker_at_its_limit_does_not_spin(protector: Protector, program: str) -> None:
    worker = protector.start(program, "--limit", "1")
    client = protector.connect()
    protector.connect()
    assert client.ask("hello") == "echo hello"
    before_s = worker.cpu_s()

    for _ in range(20):
        assert client.ask("hello") == "echo hello"
    client.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.socket.recv(1)

    assert worker.cpu_s() - before_s < 0.1


@every_way
def test_a_draining_worker_does_not_spin(protector: Protector, program: str) -> None:
    worker = protector.start(program)
    client = protector.connect()
    assert client.ask("hello") == "echo hello"
    protector.end_channel()
    before_s = worker.cpu_s()

    client.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.socket.recv(1)

    assert worker.cpu_s() - before_s < 0.1


@every_way
def test_a_client_that_resets_while_queued_harms_nobody(protector: Protector, program: str) -> None:
    gone = protector.connect()
    gone.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    gone.close()
    waiting = protector.connect()

    protector.start(program)

    assert waiting.ask("hello") == "echo hello"


@every_way
def test_a_message_of_another_version_is_refused_in_clear_words(
    protector: Protector, program: str
) -> None:
    protector.start(program)
    refused = protector.connect_only()

    protector.hand_off(version=2)

    assert refused.read() == ""
    until(lambda: "cannot read a message of version 2" in protector.log.read_text(), "the log")


@pytest.mark.parametrize("program", SERVING)
def test_a_message_of_another_version_ends_the_program_after_its_last_client(
    protector: Protector, program: str
) -> None:
    worker = protector.start(program)
    client = protector.connect()
    assert client.ask("hello") == "echo hello"
    protector.connect_only()

    protector.hand_off(version=2)

    assert client.ask("hello") == "echo hello"
    client.close()
    assert worker.wait() == 1
    assert "ProtocolError: cannot read a message of version 2" in protector.log.read_text()


@every_way
def test_a_returned_connection_is_refused_and_the_next_one_served(
    protector: Protector, program: str
) -> None:
    protector.start(program)
    returned = protector.connect_only()

    protector.hand_off(kind=wire.KIND_RETURNED, state=b"mid-stream")

    assert returned.read() == ""
    assert protector.connect().ask("hello") == "echo hello"
