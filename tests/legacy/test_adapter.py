"""The worker that speaks the original's protocol with its child (programs/legacy)."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from socketprotector_client import wire

from socketprotector.programs.legacy import adapter, stream
from tests import needs
from tests.legacy.conftest import ADAPTER, Legacy, is_root, padded, patched, pid_after, stranger
from tests.procfs import sleeps, state_of
from tests.running import DEADLINE_S, ROOT, Client, eventually, wait_gone
from tests.scenarios.tools import Gate, hold

#: As long as the child reads none of them.
MOST_UNREAD = 2
MANY = 10


def queue(legacy: Legacy, count: int = MANY) -> list[Client]:
    """Connections that the child has not read: so many in the stream, the rest in the channel."""
    clients = [legacy.channel.connect() for _ in range(count)]
    for client in clients:
        client.say("hello")
    eventually(lambda: legacy.channel.queued() <= count - MOST_UNREAD, "the stream is full")
    return clients


def test_the_child_is_ready_when_it_has_connected_and_serves(legacy: Legacy) -> None:
    worker = legacy.start()
    assert worker.ready_lines == ["READY=1", wire.RETIRES_ON_RETURN]
    child = pid_after("connected", worker)

    assert child != worker.pid
    for _ in range(5):
        client = legacy.channel.connect()
        assert client.ask("hello") == f"[{child}] hello"
        client.close()
    legacy.channel.end_channel()

    assert worker.read_rest() == [f"end of file {child} 0", f"ended {child}"]
    assert worker.wait() == 0
    assert legacy.log == ""


def test_ready_is_heard_though_there_was_no_room_for_it(legacy: Legacy) -> None:
    command = ("setsid", *ADAPTER, *legacy.command())
    worker = legacy.channel.starts_unread(*command, env=legacy.environment)

    assert worker.ready_lines == ["READY=1", wire.RETIRES_ON_RETURN]


def test_a_child_that_never_connects_is_never_ready(legacy: Legacy) -> None:
    worker = legacy.spawn(*legacy.command("never"))
    pid_after("started", worker)

    # Its listener is there, under the name in its whole length and under no other.
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(ConnectionRefusedError):
        one.connect(f"\0sock_srv_{legacy.port}")
    stranger(legacy.port).close()
    worker.term()

    assert worker.wait() == 0
    with pytest.raises(BlockingIOError):
        legacy.channel.notify.recv(100, socket.MSG_DONTWAIT)


def test_the_name_is_free_once_the_child_has_connected(legacy: Legacy) -> None:
    legacy.start()

    with socket.socket(socket.AF_UNIX) as one:
        with pytest.raises(ConnectionRefusedError):
            one.connect(padded(legacy.port))
        one.bind(padded(legacy.port))


def test_a_drain_loses_nothing(legacy: Legacy) -> None:
    worker = legacy.start("stuck")
    child = pid_after("connected", worker)
    clients = queue(legacy)

    legacy.channel.end_channel()
    worker.process.send_signal(signal.SIGUSR1)

    for client in clients:
        assert client.hear() == f"[{child}] hello"
        client.close()
    assert worker.read_rest() == [f"end of file {child} 0", f"ended {child}"]
    assert worker.wait() == 0


def test_an_adapter_that_retires_answers_what_its_child_has_and_leaves_the_rest(
    legacy: Legacy,
) -> None:
    worker = legacy.start("stuck")
    child = pid_after("connected", worker)
    clients = queue(legacy)

    worker.retire()
    worker.process.send_signal(signal.SIGUSR1)

    for client in clients[:MOST_UNREAD]:
        assert client.hear() == f"[{child}] hello"
        client.close()
    assert worker.wait() == 0
    assert legacy.channel.queued() == MANY - MOST_UNREAD


def test_a_child_that_is_killed_takes_at_most_two_connections_with_it(legacy: Legacy) -> None:
    worker = legacy.start("stuck")
    child = pid_after("connected", worker)
    clients = queue(legacy)
    eventually(lambda: legacy.channel.queued() == MANY - MOST_UNREAD, "the stream is full")

    os.kill(child, signal.SIGKILL)

    assert worker.wait() == -signal.SIGKILL
    assert legacy.channel.queued() == MANY - MOST_UNREAD
    second = legacy.start()
    answers = []
    for client in clients:
        try:
            answers.append(client.hear())
        except ConnectionResetError:
            answers.append("")
        client.close()
    ours = f"[{pid_after('connected', second)}] hello"
    assert answers == [""] * MOST_UNREAD + [ours] * (MANY - MOST_UNREAD)


def test_two_workers_share_and_none_hoards(legacy: Legacy) -> None:
    first, second = legacy.start("stuck"), legacy.start("stuck")
    clients = queue(legacy)
    eventually(lambda: legacy.channel.queued() == MANY - 2 * MOST_UNREAD, "both streams are full")

    for each in (first, second):
        each.process.send_signal(signal.SIGUSR1)
    pids = set()
    for client in clients:
        pids.add(client.hear())
        client.close()

    assert len(pids) == 2


@pytest.mark.parametrize("who", ["grandchild", "orphan", "session", "session grandchild"])
def test_a_process_that_the_child_has_started_may_connect(legacy: Legacy, who: str) -> None:
    worker = legacy.start(*who.split())
    served_by = pid_after("connected", worker)

    client = legacy.channel.connect()
    assert client.ask("hello") == f"[{served_by}] hello"
    client.close()
    worker.term()
    worker.wait()


def test_without_pidfds_of_peers_a_grandchild_may_connect_too(legacy: Legacy) -> None:
    """Before Linux 6.5 the kernel knows no such option; here none has this number."""
    worker = legacy.spawn(*legacy.command("grandchild"), adapter=patched(_SO_PEERPIDFD=9999))
    legacy.channel.wait_ready(worker)

    assert legacy.log == ""
    worker.term()
    assert worker.wait() == 0


CONNECT = """
import socket, sys
one = socket.socket(socket.AF_UNIX)
one.connect((b"\\0sock_srv_" + sys.argv[1].encode()).ljust(108, b"\\0"))
print(one.recv(1))
"""


@pytest.mark.parametrize("user", ["the same", "the same, in a later session", "nobody"])
def test_a_stranger_that_connects_first_gets_nothing(
    legacy: Legacy, tmp_path: Path, user: str
) -> None:
    through = ["setsid", "--wait"] if "session" in user else []
    if user == "nobody":
        if not is_root():
            needs.another_user()
        through = ["setpriv", "--reuid", "65534", "--clear-groups"]
    gate = Gate(tmp_path / "gate")
    worker = legacy.spawn(*gate.before(*legacy.command()))
    eventually(lambda: is_taken(legacy.port), "the name is taken")
    client = legacy.channel.connect()

    for _ in range(3):
        done = subprocess.run(
            [*through, "/usr/bin/env", "python3", "-c", CONNECT, str(legacy.port)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "b''\n"
    gate.open()
    legacy.channel.wait_ready(worker)

    assert client.ask("hello") == f"[{pid_after('connected', worker)}] hello"
    assert legacy.log.count("\n") == 1
    assert f"sock_srv_{legacy.port}: refused process " in legacy.log


def is_taken(port: int) -> bool:
    return f"@sock_srv_{port}@" in Path("/proc/net/unix").read_text()


def test_the_second_of_two_that_start_waits_for_the_name(legacy: Legacy, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    first = legacy.spawn(*gate.before(*legacy.command()))
    eventually(lambda: is_taken(legacy.port), "the name is taken")
    second = legacy.spawn(*legacy.command())
    eventually(lambda: waits_in_line(legacy.port), "the second one waits")
    assert not second.ready_lines

    gate.open()
    legacy.channel.wait_ready(first)
    legacy.channel.wait_ready(second)

    for each in (first, second):
        each.term()
        assert each.wait() == 0
    assert legacy.log == ""


def waits_in_line(port: int) -> bool:
    """A connection to the turn's name that is not accepted is there besides its listener."""
    return Path("/proc/net/unix").read_text().count(f"@socketprotector.legacy.{port}\n") > 1


@pytest.mark.parametrize("name", ["sock_srv_{}", "socketprotector.legacy.{}"])
def test_a_name_that_another_process_has_is_waited_for_and_reported(
    legacy: Legacy, name: str
) -> None:
    text = b"\0" + name.format(legacy.port).encode()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(text.ljust(108, b"\0") if name.startswith("sock_") else text)
        other.listen()
        worker = legacy.spawn(*legacy.command(), adapter=patched(_TELL_S=0))
        said = f"waiting for the name sock_srv_{legacy.port}, held by process {os.getpid()} ("
        eventually(lambda: said in legacy.log, "it says who has the name")

    legacy.channel.wait_ready(worker)
    assert legacy.log.count("\n") == 1


def test_an_adapter_that_waits_for_the_name_can_be_told_to_leave(legacy: Legacy) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(padded(legacy.port))
        other.listen()
        one = legacy.spawn(*legacy.command(), adapter=patched(_TELL_S=0))
        eventually(lambda: "waiting for the name" in legacy.log, "it waits")
        one.retire()
        assert one.wait() == 0


def test_one_that_is_killed_while_it_holds_the_name_frees_it(legacy: Legacy) -> None:
    first = legacy.spawn(*legacy.command("never"))
    started = pid_after("started", first)
    second = legacy.spawn(*legacy.command())
    eventually(lambda: waits_in_line(legacy.port), "the second one waits")

    first.process.kill()
    legacy.channel.wait_ready(second)

    os.kill(started, signal.SIGTERM)


@pytest.mark.parametrize(
    ("words", "status"),
    [(("exit=7",), 7), (("exit=0",), 0)],
)
def test_a_child_that_ends_before_it_connects_is_reported(
    legacy: Legacy, words: tuple[str, ...], status: int
) -> None:
    worker = legacy.spawn(*legacy.command(*words))

    assert worker.wait() == status
    assert f"ended before it connected to sock_srv_{legacy.port}\n" in legacy.log


def test_its_end_is_the_childs(legacy: Legacy) -> None:
    worker = legacy.start("leaves=3")
    client = legacy.channel.connect()
    client.ask("hello")
    client.close()
    assert worker.wait() == 3

    worker = legacy.start()
    os.kill(pid_after("connected", worker), signal.SIGABRT)
    assert worker.wait() == -signal.SIGABRT


def test_a_child_that_reads_no_more_gets_no_more(legacy: Legacy) -> None:
    worker = legacy.spawn(*legacy.command("closes"), adapter=patched(LEAVE_S=0.2))
    legacy.channel.wait_ready(worker)
    child = pid_after("connected", worker)
    client = legacy.channel.connect()
    client.ask("hello")
    client.close()

    assert worker.wait() == 1
    waiting = legacy.channel.connect()

    assert "reads no more connections but has not exited" in legacy.log
    assert legacy.channel.queued() == 1
    second = legacy.start()
    assert waiting.ask("hello") == f"[{pid_after('connected', second)}] hello"
    os.kill(child, signal.SIGTERM)
    assert wait_gone([child]) == []


def test_a_child_that_closes_and_ends_in_time_is_not_left(legacy: Legacy) -> None:
    worker = legacy.start("closes")
    child = pid_after("connected", worker)
    client = legacy.channel.connect()
    client.ask("hello")
    client.close()
    assert worker.read_line() == "closed"

    os.kill(child, signal.SIGTERM)

    assert worker.wait() == 0
    assert legacy.log == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on(legacy: Legacy, number: signal.Signals) -> None:
    worker = legacy.start()
    worker.process.send_signal(number)
    assert worker.wait() == 0


def test_a_stop_ends_the_stream_of_a_child_that_does_not_hear_it(legacy: Legacy) -> None:
    worker = legacy.start("deaf")
    child = pid_after("connected", worker)
    worker.term()
    assert worker.read_rest() == [f"end of file {child} 0", f"ended {child}"]
    assert worker.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_what_may_mean_anything_is_passed_on_as_it_is(
    legacy: Legacy, number: signal.Signals
) -> None:
    worker = legacy.start()
    worker.process.send_signal(number)
    assert worker.wait() == -number  # which is what it means to a program that knows nothing of it


def test_a_killed_child_is_not_waited_for_by_the_streams_of_its_children(legacy: Legacy) -> None:
    worker = legacy.start("grandchild")
    os.kill(pid_after("started", worker), signal.SIGKILL)

    assert worker.wait() == -signal.SIGKILL


def test_a_child_may_go_to_the_background(legacy: Legacy) -> None:
    worker = legacy.start("grandchild")
    child, served_by = pid_after("started", worker), pid_after("connected", worker)

    os.kill(child, signal.SIGTERM)
    eventually(lambda: state_of(child) == "Z", "it has exited")

    eventually(lambda: sleeps(worker.pid), "its end keeps nothing awake")
    client = legacy.channel.connect()
    assert client.ask("hello") == f"[{served_by}] hello"
    client.close()
    legacy.channel.end_channel()
    assert worker.wait() == 0


def test_a_child_outlives_its_worker_and_finishes(legacy: Legacy) -> None:
    worker = legacy.start("stuck")
    child = pid_after("connected", worker)
    clients = queue(legacy)

    worker.process.kill()
    worker.wait()
    os.kill(child, signal.SIGUSR1)

    for client in clients[:MOST_UNREAD]:
        assert client.hear() == f"[{child}] hello"
        client.close()
    assert wait_gone([child]) == []
    assert legacy.channel.queued() == MANY - MOST_UNREAD


def test_the_child_gets_the_workers_environment_and_nothing_of_ours(legacy: Legacy) -> None:
    worker = legacy.spawn(
        *legacy.command("environ"),
        before=("env", "-u", "LANG", "-u", "LC_ALL", "-u", "LC_CTYPE"),
        WATCHDOG_USEC="1000000",
        SOME="Thing=é",
    )
    lines = []
    while (line := worker.read_line()) and not line.startswith("connected"):
        lines.append(line)

    names = {line.removeprefix("environ ").partition("=")[0] for line in lines if "environ" in line}
    assert {"PATH", "SOME"} <= names
    assert not {
        name
        for name in names
        if name.startswith(("SOCKETPROTECTOR", "NOTIFY", "WATCHDOG", "LC_CTYPE"))
    }
    assert [line for line in lines if "descriptor" in line] == [f"descriptor {n}" for n in range(3)]
    assert "signals 1 1 0" in lines


def test_the_watchdog_is_fed(legacy: Legacy) -> None:
    worker = legacy.start(WATCHDOG_USEC="20000")
    for _ in range(3):
        assert legacy.channel.notify.recv(100) == b"WATCHDOG=1"
    hold(worker.pid)
    os.kill(worker.pid, signal.SIGCONT)


def test_a_watchdog_may_be_longer_than_the_kernel_can_wait(legacy: Legacy) -> None:
    """poll(2) takes 24.8 days at most."""
    legacy.start(WATCHDOG_USEC=str(60 * 86_400_000_000))
    assert legacy.channel.notify.recv(100) == b"WATCHDOG=1"
    assert legacy.channel.connect().ask("hello")


def test_the_channels_flags_are_left_alone(legacy: Legacy) -> None:
    legacy.start()
    legacy.channel.connect().ask("hello")
    flags = fcntl.fcntl(legacy.channel.reader, fcntl.F_GETFL)
    assert not flags & os.O_NONBLOCK


def test_what_is_no_connection_is_closed(legacy: Legacy) -> None:
    legacy.start()
    for version, kind in ((9, wire.KIND_CONNECTION), (wire.VERSION, wire.KIND_RETURNED)):
        client = legacy.channel.connect_only()
        legacy.channel.hand_off(version=version, kind=kind)
        assert client.hear() == ""
    client = legacy.channel.connect_only()
    accepted, _ = legacy.channel.listeners[0].accept()
    legacy.channel.send(accepted.fileno(), listener=77)
    accepted.close()
    assert client.hear() == ""
    assert legacy.channel.connect().ask("hello").endswith("] hello")


def test_each_port_has_a_stream_of_its_own(legacy: Legacy) -> None:
    legacy.channel.listeners.append(socket.create_server(("127.0.0.1", 0)))
    ports = [one.getsockname()[1] for one in legacy.channel.listeners]
    worker = legacy.spawn(*legacy.command(ports=f"{ports[1]},{ports[0]}"))
    legacy.channel.wait_ready(worker)

    for index in (0, 1):
        client = legacy.channel.connect(index)
        assert client.ask("hello").endswith("] hello")
        client.close()
    legacy.channel.end_channel()
    assert worker.wait() == 0


@pytest.mark.parametrize("background", [False, True])
def test_a_child_of_two_streams_gets_the_end_when_it_has_read_both(
    legacy: Legacy, background: bool
) -> None:
    """It ends at the first end of file."""
    legacy.channel.listeners.append(socket.create_server(("127.0.0.1", 0)))
    ports = ",".join(str(one.getsockname()[1]) for one in legacy.channel.listeners)
    words = ("grandchild", "stuck") if background else ("stuck",)
    worker = legacy.spawn(*legacy.command(*words, ports=ports), WATCHDOG_USEC="20000")
    legacy.channel.wait_ready(worker)
    if background:
        parent = pid_after("started", worker)
        os.kill(parent, signal.SIGTERM)
        eventually(lambda: state_of(parent) == "Z", "it has exited")
    child = pid_after("connected", worker)
    clients = [legacy.channel.connect(index) for index in (0, 1)]
    for client in clients:
        client.say("hello")
    eventually(lambda: legacy.channel.queued() == 0, "both are in their streams")
    legacy.channel.end_channel()
    legacy.channel.hear_all()
    legacy.channel.notify.settimeout(DEADLINE_S)
    for _ in range(3):  # by then the adapter has seen the end
        assert legacy.channel.notify.recv(100) == b"WATCHDOG=1"

    os.kill(child, signal.SIGUSR1)

    for client in clients:
        assert client.hear() == f"[{child}] hello"
        client.close()
    assert worker.wait() == 0


def test_two_addresses_with_one_port_are_one_stream(legacy: Legacy) -> None:
    port = legacy.port
    listeners = f"- tcp:0.0.0.0:{port} tcp:[::]:{port} tcp:[fe80::1%25lo]:{port}"
    worker = legacy.spawn(*legacy.command(), SOCKETPROTECTOR_LISTENERS=listeners)
    legacy.channel.wait_ready(worker)

    for index in (1, 2, 3):
        client = legacy.channel.connect_only()
        accepted, _ = legacy.channel.listeners[0].accept()
        legacy.channel.send(accepted.fileno(), listener=index)
        accepted.close()
        assert client.ask("hello").endswith("] hello")
        client.close()


@pytest.mark.parametrize(
    ("listeners", "said"),
    [
        ("tcp:0.0.0.0:80 unix:/run/x.sock", "unix:/run/x.sock has no port"),
        ("unix:@name", "unix:@name has no port"),
        ("-", "no listener with a port is left"),
        ("", "no listener with a port is left"),
    ],
)
def test_without_a_port_there_is_no_name(legacy: Legacy, listeners: str, said: str) -> None:
    worker = legacy.spawn(*legacy.command(), SOCKETPROTECTOR_LISTENERS=listeners)

    assert worker.wait() == 2
    assert said in legacy.log
    assert legacy.log.count("\n") == 1


def test_a_command_that_is_not_there_is_one_line(legacy: Legacy) -> None:
    assert legacy.spawn("/nowhere/daemon").wait() == 111
    assert (
        legacy.log
        == "socketprotector.legacy: cannot start /nowhere/daemon: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "usage: python -m socketprotector.programs.legacy.adapter -- COMMAND [ARG...]"),
        (("--",), "usage: "),
        (("true",), "usage: "),
        (("--", "true"), "must be started by SocketProtector (--handoff legacy)"),
    ],
)
def test_by_hand_it_says_how_it_is_started(words: tuple[str, ...], said: str) -> None:
    command = [*ADAPTER[:-1], *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    assert done.returncode == 2
    assert done.stderr.startswith(f"socketprotector.legacy: {said}")
    assert done.stderr.count("\n") == 1


def test_a_number_that_is_no_socket_is_refused(legacy: Legacy) -> None:
    assert legacy.spawn(*legacy.command(), SOCKETPROTECTOR_CHANNEL="99").wait() == 2
    assert legacy.log == (
        "socketprotector.legacy: SOCKETPROTECTOR_CHANNEL=99 is no socket of ours\n"
    )


def test_without_descriptors_it_ends_before_it_could_lose_a_connection(legacy: Legacy) -> None:
    """To serve takes fewer than to start, and what was freed is enough for the one in hand."""
    waiting = legacy.channel.connect()
    waiting.say("hello")
    ended = 0
    for limit in range(8, 24):
        worker = legacy.spawn(
            *legacy.command("leaves=0"),
            before=("/bin/sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"),
        )
        try:
            legacy.channel.wait_ready(worker)
        except AssertionError:
            assert worker.wait() in (1, 111)
            assert "Too many open files" in legacy.log.splitlines()[-1]
            assert legacy.channel.queued() == 1
            ended += 1
        else:
            assert waiting.hear().endswith("] hello")
            break

    assert 0 < ended < 16
    assert "lost" not in legacy.log


def test_it_loads_little() -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; before = set(sys.modules); "
    code += (
        "import socketprotector.programs.legacy.adapter; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= {
        *{"__future__", "_signal", "_socket", "errno", "fcntl", "posix", "select", "struct"},
        *{"termios", "time"},
        *{"_struct", "socketprotector", "socketprotector.programs", "socketprotector_client"},
        *{"socketprotector.programs.legacy", "socketprotector.programs.legacy.adapter"},
        *{"socketprotector.programs.legacy.stream", "socketprotector.system"},
        *{"socketprotector.system.polling", "socketprotector.system.signals"},
        "socketprotector.programs.worker_protocol",
        *{"socketprotector_client.wire", "importlib", "importlib._bootstrap", "os", "stat"},
        *{
            "_collections_abc",
            "os.path",
            "posixpath",
            "genericpath",
            "_stat",
            "abc",
            "_abc",
            "warnings",
        },
        *{"importlib._bootstrap_external"},
    }


def test_the_constants_are_those_of_the_documentation() -> None:
    text = (ROOT / "docs" / "stdio.md").read_text()
    assert f"{stream.SUN_PATH_BYTES} bytes" in text
    assert f"{adapter.LEAVE_S:g} s" in text
