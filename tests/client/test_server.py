"""A SocketServer: its children share one queue, and take turns."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from socketprotector_client import SocketServer
from socketprotector_client.address import sockname_of

from tests.channel import LIBRARY, PYTHON, Channel
from tests.client.sharing import HOME, Sharing, refuses, until_stopped
from tests.procfs import descriptors, ports_of, threads_of
from tests.running import DEADLINE_S, ROOT, Client, eventually

EXAMPLE = ROOT / "client_lib" / "examples" / "shared_queue.py"


def test_each_child_serves_one_client_at_a_time(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "2", "64", HOME)
    clients = [sharing.connect() for _ in range(2)]
    pids = [client.ask("pid") for client in clients]
    waiting = sharing.connect()
    waiting.say("pid")
    assert sorted(map(int, pids)) == sorted(sharing.children())

    clients[1].close()

    assert waiting.hear() == pids[1]
    assert clients[0].ask("hello") == "echo hello"


def test_a_client_may_send_before_there_is_a_child_and_usr1_forks_one(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "0", "64", HOME)
    clients = [sharing.connect() for _ in range(2)]
    for client in clients:
        client.say("pid")

    sharing.signal(signal.SIGUSR1)
    first = clients[0].hear()
    sharing.signal(signal.SIGUSR1)
    second = clients[1].hear()

    assert len({first, second, str(sharing.program.pid)}) == 3


def test_a_usr1_that_was_blocked_until_run_forks_a_child_too(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "early", "64", HOME)
    clients = [sharing.connect() for _ in range(2)]

    assert len({client.ask("pid") for client in clients}) == 2


def test_the_parent_has_no_thread_when_it_forks(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "1", "64", HOME)
    sharing.connect().ask("hello")

    assert len(threads_of(sharing.program.pid)) == 1


def test_a_stop_serves_clients_that_have_connected_and_no_new_ones(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "1", "6", HOME)
    clients = [sharing.connect() for _ in range(40)]
    for client in clients:
        client.say("hello")
    assert clients[0].hear() == "echo hello"

    sharing.signal(signal.SIGTERM)

    for before, client in pairwise(clients):
        before.close()
        assert client.hear() == "echo hello"
    clients[-1].close()
    assert (sharing.program.read_last(), sharing.program.wait()) == ("ended", 0)
    assert refuses(sharing.listeners[0])


def test_a_stop_serves_them_though_the_last_child_is_killed(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "1", "64", HOME)
    clients = [sharing.connect() for _ in range(3)]
    for client in clients:
        client.say("pid")
    child = int(clients[0].hear())
    sharing.signal(signal.SIGTERM)
    eventually(lambda: refuses(sharing.listeners[0]), "it stops")

    os.kill(child, signal.SIGKILL)

    for client in clients[1:]:
        assert int(client.hear()) not in (child, sharing.program.pid)
        client.close()
    assert sharing.program.wait() == 0


def test_a_handler_can_tell_that_it_is_the_last(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "1", "64", HOME)
    client = sharing.connect()
    assert client.ask("draining") == "False"

    sharing.signal(signal.SIGTERM)

    eventually(lambda: client.ask("draining") == "True", "the drain")
    client.close()
    assert sharing.program.wait() == 0


def test_a_stop_under_load_loses_no_connection(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "3", "16", HOME)
    answered: list[bytes] = []
    served = threading.Semaphore(0)

    def connect_until_refused() -> None:
        while True:
            try:
                client = socket.create_connection(sockname_of(sharing.listeners[0]), DEADLINE_S)
            except ConnectionRefusedError:
                return
            with client:
                try:
                    client.sendall(b"hello\n")
                    answered.append(client.recv(64))
                    served.release()
                except OSError as error:
                    answered.append(str(error).encode())

    threads = [threading.Thread(target=connect_until_refused) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        assert served.acquire(timeout=DEADLINE_S)
    sharing.signal(signal.SIGTERM)
    for thread in threads:
        thread.join(DEADLINE_S)

    assert sharing.program.wait() == 0
    assert set(answered) == {b"echo hello\n"}
    assert len(answered) < 20_000  # new clients are refused: otherwise 65,536 come after the signal


def test_a_full_queue_leaves_the_rest_to_the_backlog(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "0", "6", HOME)
    accepting = sharing.accepting()
    clients = [sharing.connect() for _ in range(40)]
    for client in clients:
        client.say("hello")

    # What the queue holds, one undelivered, and no more of what it owns itself.
    assert len(descriptors(accepting)) <= 7
    sharing.signal(signal.SIGUSR1)

    for client in clients:
        assert client.hear() == "echo hello"
        client.close()


def test_a_full_queue_loses_no_client_of_another_address(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "0", "6", HOME, HOME)
    os.kill(sharing.accepting(), signal.SIGSTOP)
    until_stopped(sharing.accepting())
    clients = [sharing.connect(number) for _ in range(20) for number in (0, 1)]
    for client in clients:
        client.say("hello")
        client.socket.shutdown(socket.SHUT_WR)

    os.kill(sharing.accepting(), signal.SIGCONT)
    eventually(lambda: len(descriptors(sharing.accepting())) >= 7, "a full queue")
    sharing.signal(signal.SIGUSR1)

    for client in clients:
        assert client.hear() == "echo hello"
        client.close()


def test_servers_of_one_program_have_a_queue_each(channel: Channel) -> None:
    sharing = Sharing(channel, "by hand", HOME, HOME)
    first, second = sharing.connect(0), sharing.connect(1)
    pids = first.ask("pid"), second.ask("pid")
    assert len(set(pids)) == 2

    waiting = sharing.connect(1)
    waiting.say("pid")
    second.close()

    assert waiting.hear() == pids[1]
    first.close()
    waiting.close()
    sharing.signal(signal.SIGTERM)
    assert sharing.program.read_rest() == ["child ended", "child ended", "ended"]
    assert sharing.program.wait() == 0


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_take_from_it(channel: Channel, method: str) -> None:
    sharing = Sharing(channel, "multiprocessing", HOME, method)
    client = sharing.connect()
    assert client.ask("hello") == "echo hello"

    sharing.signal(signal.SIGTERM)
    client.close()

    assert sharing.program.read_rest() == ["child ended 0", "ended"]
    assert sharing.program.wait() == 0


def test_it_listens_on_unix_and_ipv6_too(channel: Channel, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    sharing = Sharing(channel, "run", "1", "64", f"unix:{path}", "[::1]:0")

    for number, name in enumerate(sharing.listeners):
        client = sharing.connect(number)
        assert client.ask("listener") == name
        client.close()
    waiting = sharing.connect(0)
    sharing.signal(signal.SIGTERM)

    assert waiting.ask("hello") == "echo hello"
    waiting.close()
    assert sharing.program.wait() == 0
    assert not path.exists()


# Under a protector


def test_under_a_protector_the_queue_is_the_protectors(channel: Channel) -> None:
    program = channel.spawn("shares.py", "run", "2", "64", HOME)
    channel.wait_ready(program)
    clients = [channel.connect() for _ in range(2)]

    pids = {client.ask("pid") for client in clients}

    assert len(pids - {str(program.pid)}) == 2
    assert not ports_of(program.pid)
    channel.end_channel()
    eventually(lambda: clients[0].ask("draining") == "True", "the drain")
    for client in clients:
        client.close()
    assert (program.read_last(), program.wait()) == ("ended", 0)


def test_under_a_protector_term_lets_children_finish(channel: Channel) -> None:
    program = channel.spawn("shares.py", "run", "1", "64", HOME)
    channel.wait_ready(program)
    client = channel.connect()
    assert client.ask("hello") == "echo hello"

    program.term()

    eventually(lambda: client.ask("draining") == "True", "the drain")
    client.close()
    assert (program.read_last(), program.wait()) == ("ended", 0)


def test_under_a_protector_a_killed_child_is_replaced(channel: Channel) -> None:
    program = channel.spawn("shares.py", "run", "1", "64", HOME)
    channel.wait_ready(program)
    client = channel.connect()
    child = int(client.ask("pid"))

    os.kill(child, signal.SIGKILL)

    assert client.hear() == ""
    assert int(channel.connect().ask("pid")) not in (child, program.pid)
    assert "ended with -9; 0 left" in channel.log.read_text()


def test_under_a_protector_the_last_child_is_replaced_while_clients_wait(channel: Channel) -> None:
    """And so is the parent.  There may be no other worker to take them."""
    program = channel.spawn("shares.py", "run", "1", "64", HOME)
    channel.wait_ready(program)
    clients = [channel.connect() for _ in range(3)]
    for client in clients:
        client.say("pid")
    first = int(clients[0].hear())
    channel.end_channel()

    os.kill(first, signal.SIGKILL)
    second = int(clients[1].hear())
    assert second not in (first, program.pid)
    for pid in (program.pid, second):
        os.kill(pid, signal.SIGKILL)
    program.wait()

    program = channel.spawn("shares.py", "run", "1", "64", HOME)
    assert int(clients[2].hear()) not in (second, program.pid)
    clients[2].close()
    assert program.wait() == 0


def test_a_retired_parent_leaves_clients_that_wait_to_other_workers(channel: Channel) -> None:
    """Its children would take none of them, so it would fork for ever."""
    retired = channel.spawn("shares.py", "run", "1", "64", HOME)
    channel.wait_ready(retired)
    served, waits = channel.connect(), channel.connect()
    assert served.ask("hello") == "echo hello"
    waits.say("pid")
    retired.retire()
    channel.end_channel()

    served.close()

    assert retired.wait() == 0
    other = channel.spawn("shares.py", "run", "1", "64", HOME)
    assert int(waits.hear()) != other.pid
    waits.close()
    assert other.wait() == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_under_a_protector_multiprocessing_takes_too(channel: Channel, method: str) -> None:
    program = channel.spawn("shares.py", "multiprocessing", HOME, method)
    client = channel.connect()
    assert client.ask("hello") == "echo hello"
    client.close()

    channel.end_channel()

    assert program.read_rest()[-2:] == ["child ended 0", "ended"]
    assert program.wait() == 0


def test_under_a_protector_there_is_one_queue_only(channel: Channel) -> None:
    program = channel.spawn("shares.py", "twice", HOME, HOME)

    assert program.wait() == 1
    assert "RuntimeError: cannot make a second SocketServer" in channel.log.read_text()


# What it refuses, and what it leaves behind (the fixture looks)


def test_it_leaves_nothing_behind() -> None:
    with SocketServer([HOME, "[::1]:0"]) as server:
        names = server.listeners
        assert not any(refuses(name) for name in names)

    assert all(refuses(name) for name in names)
    server.close()


def test_an_address_in_use_is_refused_in_words() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match=r"cannot listen on tcp:127.0.0.1:\d+: Address already in use"),
    ):
        SocketServer(taken.getsockname())


def test_a_server_needs_an_address_and_a_queue() -> None:
    with pytest.raises(ValueError, match="cannot tell where to listen"):
        SocketServer()
    with pytest.raises(ValueError, match="queue=5: at least 6"):
        SocketServer(HOME, queue=5)


@pytest.mark.parametrize(("interpreter", "reason"), [("", "no interpreter"), ("false", "with 1")])
def test_a_failed_start_frees_the_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interpreter: str, reason: str
) -> None:
    monkeypatch.setattr(sys, "executable", interpreter)

    with pytest.raises(OSError, match=f"cannot start the accepting process: .*{reason}"):
        SocketServer(f"unix:{tmp_path / 'socket'}")

    assert not (tmp_path / "socket").exists()


def test_it_leaves_a_path_that_another_program_has_bound_since(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with SocketServer(f"unix:{path}"):
        path.unlink()
        other = socket.create_server(str(path), family=socket.AF_UNIX)

    other.close()
    assert path.exists()


def test_it_cannot_be_pickled_but_for_a_new_process() -> None:
    import pickle

    with (
        SocketServer(HOME) as server,
        pytest.raises(RuntimeError, match="should only be shared between processes"),
    ):
        pickle.dumps(server)


# The example


def test_the_example_is_the_echo_server_of_the_slides() -> None:
    with subprocess.Popen(
        [PYTHON, EXAMPLE, HOME],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "client_lib")},
    ) as program:
        try:
            assert program.stdout is not None
            words = program.stdout.readline().split()
            answers = []
            for _ in range(2):
                client = Client(sockname_of(words[-1]))
                answers += [client.ask("hello"), client.ask("quit"), client.hear()]
                client.close()
            program.terminate()
            assert program.wait(DEADLINE_S) == 0
        finally:
            program.kill()

    pid = answers[0].split()[0]
    assert pid != f"[{words[1]}]"
    assert answers == [f"{pid} hello", f"{pid} quit", ""] * 2


@pytest.mark.parametrize("children", ["y", "00"])
def test_the_example_says_how_it_is_used(children: str) -> None:
    ended = subprocess.run(
        [PYTHON, EXAMPLE, HOME, children],
        env={**os.environ, **LIBRARY},
        capture_output=True,
        check=False,
    )

    assert ended.returncode != 0
    assert ended.stderr == b"usage: shared_queue.py [ADDRESS [CHILDREN]]\n"


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 30
