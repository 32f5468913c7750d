"""Each parser of what other programs say: workers, helpers, hosts, files and variables.

As in test_parsers.py: it answers, refuses by its own error, or reads nothing; what is well formed
is understood.
"""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import sys
import threading
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from socketprotector_client import channel, watchdog, wire
from socketprotector_client.environment import read_environment
from socketprotector_client.errors import Drained, ProtocolError
from socketprotector_exporter.collector import ProtectorCollector
from socketprotector_exporter.http import Server
from socketprotector_exporter.token_file import read_token

from socketprotector.core.events import TimeExtended
from socketprotector.core.snapshot import CODEC
from socketprotector.ctl import discovery
from socketprotector.ctl.errors import NoProtector
from socketprotector.daemon.first_programs import FirstPrograms
from socketprotector.daemon.prober_client import Prober
from socketprotector.daemon.worker_messages import WorkerMessages
from socketprotector.launch import activation, config_file
from socketprotector.launch.pid_file import PidFile
from socketprotector.model import settings
from socketprotector.model.codec import FORMAT, DecodeError
from socketprotector.model.errors import Refusal, UsageError
from socketprotector.model.http_answer import HttpAnswer
from socketprotector.programs import guard, log_relay, worker_protocol
from socketprotector.system import env_file, inherited, procfs, sd_notify, state_file
from socketprotector.system.scoreboard import Board
from socketprotector.system.state_file import StateError, StateFile
from tests.hostile.examples import FEW, JSON

#: Numbers, and what only looks like one.
NUMBERS = st.sampled_from(
    ["", "0", "1", "3", "-1", "\u00b2", "\u0661", "9" * 4, "9" * 30, "9" * 5000, "1e3", " 3", "nan"]
)
TEXTS = NUMBERS | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
MINE = str(os.getpid())
HEADER = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, 0, 0, 7)


def near(*words: bytes) -> st.SearchStrategy[bytes]:
    """Bytes, and what is put together of what a parser looks for."""
    return st.binary() | st.lists(st.sampled_from(words) | st.binary(max_size=3)).map(b"".join)


# -- workers and helpers -----------------------------------------------------------------------


@FEW
@given(
    near(b"READY=1", b"\n", b"STATUS=", b"EXTEND_TIMEOUT_USEC=", b"9" * 30, b"5", b"\xc2\xb2")
    | NUMBERS.map(lambda number: f"EXTEND_TIMEOUT_USEC={number}".encode())
)
def test_what_a_worker_says(data: bytes) -> None:
    posted: list[Any] = []
    noted: list[dict[str, Any]] = []
    runtime: Any = SimpleNamespace(
        loop=None, log=SimpleNamespace(write=lambda *_, **__: None), post=posted.append
    )
    worker: Any = SimpleNamespace(readiness=SimpleNamespace(by_message=False))
    first: Any = SimpleNamespace(handle=lambda *_: None)
    failed: Any = lambda: SimpleNamespace(child_failed=lambda *_: None)  # noqa: E731
    one = WorkerMessages(
        runtime, {}, first, lambda _, **fields: noted.append(fields), lambda *_: None, failed
    )
    fields = {name: each for name, each in sd_notify.parse(data).items() if name != "WATCHDOG"}

    one._handle(1, worker, fields)
    one._handle(1, worker, sd_notify.parse(b"EXTEND_TIMEOUT_USEC=2000000"))

    assert posted[-1] == TimeExtended(1, 2.0)
    assert all(0 <= each.seconds < math.inf for each in posted)
    assert all(len(each["status"]) <= 500 for each in noted)


@FEW
@given(TEXTS | st.lists(NUMBERS | st.just("failed"), max_size=4).map(" ".join))
def test_what_a_pool_says_of_its_first_programs(text: str) -> None:
    record = SimpleNamespace(programs_work=False, programs_failed=0, drained_at=None, number=1)
    program = SimpleNamespace(mode=SimpleNamespace(pooled=True))
    worker: Any = SimpleNamespace(
        record=SimpleNamespace(asked_to_exit=False),
        generation=SimpleNamespace(record=record, program=program, update_record=lambda **_: None),
    )
    one = FirstPrograms.__new__(FirstPrograms)
    failed: list[tuple[int, int]] = []
    object.__setattr__(one, "_handle_failure", lambda _, pid, status: failed.append((pid, status)))

    one.handle(worker, text)
    one.handle(worker, "failed 12 256")

    assert failed[-1] == (12, 256)
    assert all(0 <= number < 10**9 for pair in failed for number in pair)


@FEW
@given(
    near(b"HTTP/1.1 ", b"200", b" OK", b"\r\n", b"Content-Length: ", b"-1", b"9" * 20)
    | near(b"HTTP/1.1 103 x\r\n\r\n", b"HTTP/1.1 500 \x1b[2J\r\n\r\n", b"chunked", b": ", b"\n")
)
def test_the_answer_of_a_release_that_is_asked(answer: bytes) -> None:
    def says(said: bytes) -> str:
        answer = HttpAnswer((200,))
        whole = answer.feed(said) if said else None
        why = answer.feed(b"") if whole is None else whole
        assert why is not None
        return why

    why = says(answer)

    assert why == "" or (why.isprintable() and len(why) < 300)
    assert says(b"HTTP/1.1 200 OK\r\n\r\n") == ""


@FEW
@given(TEXTS | st.lists(NUMBERS | st.sampled_from(["+", "-", "~", " "])).map("".join))
def test_what_a_prober_reports(text: str) -> None:
    heard: list[str] = []
    one = Prober.__new__(Prober)
    one._number, one._answered, one._late = 3, heard.append, heard.append
    one._on_message(text)
    one._on_message("-2 of an earlier request")
    one._on_message("-3 why")
    assert heard[-1] == "why"
    assert "of an earlier request" not in heard


@FEW
@given(st.lists(near(b"\n", b"<3>", b"<\xb2>", b"\0", b"x" * 9000)), st.booleans())
def test_what_workers_print(pieces: list[bytes], prefixed: bool) -> None:
    """All of it is passed on, in order; little is kept back."""
    line, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    relay = log_relay.Relay(line.detach(), "lines", prefixed=prefixed)
    written: list[bytes] = []
    object.__setattr__(relay, "write", written.append)
    receive, send = os.pipe()
    stream = log_relay.Stream(receive, 1, b"[1 2] " if prefixed else b"")
    relay.add(stream)
    for piece in filter(None, pieces):
        relay.take(stream, piece)
        assert len(stream.rest) <= log_relay.HELD_BYTES
        assert len(stream.tail) <= log_relay.TAIL_BYTES
    relay.take(stream, b"")
    for one in (relay.line, relay.epoll, far):
        assert one is not None
        one.close()
    os.close(send)

    said, given_ = b"".join(written), b"".join(pieces)
    if not prefixed:
        assert said == given_ + b"\n" * (not given_.endswith(b"\n") and bool(given_))
    assert said.count(b"\n") >= given_.count(b"\n")


@FEW
@given(near(b"FDSTORE=1", b"FDNAME=", b"\n", b"=", b"X_TOOK=", b"15", b"READY=1"))
def test_the_lines_of_a_guards_message(data: bytes) -> None:
    assert all("\n" not in name + value for name, value in guard.pairs(data).items())
    assert guard.pairs(data + b"\nREADY=1")["READY"] == "1"


@FEW
@given(near(HEADER, b"\1", b"\0", b"\2") | st.binary(min_size=16, max_size=17), st.booleans())
def test_a_message_of_the_channel(data: bytes, with_connection: bool) -> None:
    """For the library and the adapters: what is no connection is closed, and said to be none."""
    before = len(os.listdir("/proc/self/fd"))
    for take in (_taken, _received):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open("/dev/null", "rb") as null:
            rights = [null.fileno()] * with_connection
            for each, fds in ((data or b"x", rights), (HEADER, [null.fileno()])):
                socket.send_fds(theirs, [each], fds)
            found = [fd for fd in take(ours.detach()) if fd >= 0]
        for fd in found:
            os.close(fd)
        assert len(found) >= 1, "the positive control"
    assert len(os.listdir("/proc/self/fd")) == before


def _taken(fd: int) -> list[int]:
    one, found = channel.Channel(fd), []
    for _ in range(2):
        with suppress(ProtocolError, Drained):
            taken = one.take()
            found.append(taken[0] if taken is not None else -1)
    one.close()
    return found


def _received(fd: int) -> list[int]:
    said: list[str] = []
    with socket.socket(fileno=fd) as one:
        return [found[0] for _ in range(2) if (found := worker_protocol.receive(one, said.append))]


@FEW
@given(st.lists(st.integers(0, 2**64 - 1), min_size=64, max_size=64))
def test_a_workers_counters(words: list[int]) -> None:
    board = Board.make()
    for state in (words[0], wire.BOARD_COUNTED):
        os.pwrite(board.fd, struct.pack("64Q", state, *words[1:]), 0)
        found = board.read(0)
    board.close()

    assert found is not None
    assert max(found.accepted, found.errors, *found.waits) <= 2**53
    assert found.active <= found.accepted


# -- variables ---------------------------------------------------------------------------------


@FEW
@given(
    NUMBERS,
    st.just(MINE) | NUMBERS,
    TEXTS | st.sampled_from(["sp.names.900009", "sp.names.\u00b2"]),
)
def test_the_variables_of_a_service_manager(count: str, pid: str, names: str) -> None:
    """Beyond any descriptor that there is; what is passed in is found in test_activation.py."""
    told = {"LISTEN_FDS": count, "LISTEN_PID": pid, "LISTEN_FDNAMES": names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inherited, "FIRST", 900_000)
        for read in (activation.passed, inherited.receive, inherited.is_ours):
            for name, value in told.items():
                patch.setenv(name, value)
            with suppress(OSError):  # a number that names no descriptor
                assert not cast("Any", read)() or read is activation.passed
    limit = sd_notify.room_of({"FDSTORE": count}, 1024)
    assert 0 <= limit <= 1024
    assert sd_notify.room_of({"FDSTORE": "7"}, 1024) == 7


@FEW
@given(st.dictionaries(
    st.sampled_from([wire.ENV_RETURN, wire.ENV_SCOREBOARD, wire.ENV_WORKERS, wire.ENV_LISTENERS]),
    TEXTS | st.just("%ff unix:@x tcp:[::]:1"),
), NUMBERS, NUMBERS)  # fmt: skip
def test_the_variables_of_a_worker(told: dict[str, str], count: str, usec: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        fd = str(ours.fileno())
        for number in (fd, count):
            with suppress(ProtocolError, OSError):
                found = read_environment({**told, wire.ENV_CHANNEL: number})
                assert found.channel_fd == int(number)
        assert read_environment({wire.ENV_CHANNEL: fd}).channel_fd == int(fd)
    with suppress(OSError):
        read_environment({**told, "LISTEN_PID": MINE, "LISTEN_FDS": count})
    with suppress(OSError):
        assert worker_protocol.inherited({"X": count}, "X") >= -1
    every = watchdog.interval_s, lambda environ: worker_protocol.Notifier(environ).watchdog_s
    for interval_s in every:
        assert 0 <= interval_s({"WATCHDOG_USEC": usec}) < math.inf
        assert interval_s({"WATCHDOG_USEC": "2000000"}) == 1.0
    for stream in range(3):
        os.set_inheritable(stream, True)  # a worker's line, as the variables may say


# -- files -------------------------------------------------------------------------------------


def _record(kind: bytes, form: int, sequence: int, excess: int, payload: bytes) -> bytes:
    """Return a record with the right checksum.  excess: by which its length is wrong."""
    length = max(0, len(payload) + excess)
    header = state_file._HEADER.pack(kind, form, sequence, length)
    return header + state_file._CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(header))) + payload


@FEW
@given(
    st.binary()
    | st.lists(
        st.builds(
            _record,
            st.sampled_from([state_file._WHOLE, state_file._CHANGE, b"SPxx"]),
            st.sampled_from([0, FORMAT, FORMAT + 1, 2**32 - 1]),
            st.sampled_from([0, 1, 2, 2**63, 2**63 + 1, 2**64 - 1]),
            st.sampled_from([0, 0, 0, -1, 1, 2**62]),
            st.binary(max_size=8),
        )
    ).map(b"".join)
)
@example(_record(state_file._WHOLE, FORMAT, 2**64 - 1, 0, b""))  # none comes after it
def test_a_state_file(data: bytes) -> None:
    for at in (0, 64 * 1024 * 1024):
        one = StateFile.make()
        os.pwrite(one.fd, data, at)
        found = StateFile(one.fd)
        with suppress(StateError):
            found.read()
        found.write(b"good")
        if found._sequence <= state_file._LAST_SEQUENCE:
            assert StateFile(one.fd).read()[0] == b"good"
        os.close(one.fd)


@FEW
@given(
    JSON.map(lambda value: json.dumps(value).encode())
    | st.binary()
    | st.sampled_from([b"[" * 5_000, b'{"b":1}', b'{"s":3}', b'{"e":"x"}', b'{"c":"Fleet"}'])
    | JSON.map(lambda value: json.dumps({"c": "Settings", "f": value}).encode())
)
def test_a_value_in_the_state(data: bytes) -> None:
    for codec in (CODEC, settings._CODEC):
        with suppress(DecodeError):
            codec.decode(data)
    assert CODEC.decode(CODEC.encode((1, "x"))) == (1, "x")


@FEW
@given(
    near(b"listen = ", b"[", b"]", b'"', b"\n", b"workers", b" = ", b"9" * 30, b"[env]", b"{", b"'")
    | st.sampled_from([b"a = " + b"[" * 20_000, b"workers = " + b"9" * 5000, b"\xff"])
)
def test_a_configuration_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "web.toml"
    path.write_bytes(data)
    with suppress(Refusal):
        config_file.ConfigFile(str(path))
    path.write_bytes(b"workers = 2\n")
    found = config_file.ConfigFile(str(path))
    assert found.values == {"workers": "2"}


@FEW
@given(near(b"A=", b"export ", b"\n", b"'", b'"', b"#", b"\0", b"="))
def test_a_file_of_variables(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    with suppress(ValueError):
        for name, value in env_file.parse(text, "x").items():
            assert name.isidentifier()
            assert "\0" not in value
    assert env_file.parse("export A='b c'\n", "x") == {"A": "b c"}


@FEW
@given(near(b"1", b"\n", b" ", b"\xb2", b"9" * 40, b"-"))
def test_a_pid_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "pid"
    path.write_bytes(data)
    with suppress(UsageError):
        PidFile(str(path)).refuse_if_held("stop it")
        assert len(data) <= 32
    with suppress(UsageError):
        assert 0 <= discovery._read_pid(str(path))[0] < 10**9
    path.write_bytes(b"12\n")
    assert discovery._read_pid(str(path)) == (12, os.getuid())
    PidFile(str(path)).refuse_if_held("stop it")


@FEW
@given(near(b" ", b"\n", b"#", b"=", b"x"))
def test_the_file_of_a_token(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(data)
    path.chmod(0o600)
    with suppress(UsageError):
        assert read_token("--token", str(path)).isprintable()
    path.write_bytes(b"abc\n")
    assert read_token("--token", str(path)) == "abc"


# -- clients of the exporter -------------------------------------------------------------------


@FEW
@given(st.text() | st.sampled_from(["", "..", "a/b", "\0", "\ud800", "x" * 5000, "web:80"]))
def test_a_name_that_is_asked_for(runtime: Path, name: str) -> None:
    """By HAProxy's agent, in a path of /readyz, or by --name: there is none of it."""
    found = ProtectorCollector().query_one(name)
    assert [each for _, each in found] == [None]
    with pytest.raises((NoProtector, UsageError)):
        discovery.by_name(name)


@FEW
@given(
    near(b"GET ", b"/healthz", b"/readyz/%00", b" HTTP/1.1", b"\r\n", b"Accept: a;version=x", b":")
)
def test_a_request_to_the_exporter(server: Server, data: bytes) -> None:
    for sent in (data + b"\r\n\r\n", b"GET /healthz HTTP/1.0\r\n\r\n"):
        answer = b""
        to = cast("tuple[str, int]", server.server_address)
        with suppress(ConnectionError), socket.create_connection(to) as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            while piece := client.recv(65_536):
                answer += piece
    assert answer.startswith(b"HTTP/1.0 200 ") or b" 200 OK" in answer
    assert answer.endswith(b"ok\n")


@pytest.fixture
def server(runtime: Path) -> Any:
    """/metrics in this process."""
    with Server(("127.0.0.1", 0), ProtectorCollector(), None) as one:
        wrong: list[object] = []
        cast("Any", one).handle_error = lambda *_: wrong.append(sys.exception())
        serving = threading.Thread(target=one.serve_forever)
        serving.start()
        try:
            yield one
        finally:
            one.shutdown()
            serving.join()
    assert [each for each in wrong if not isinstance(each, OSError)] == []


@FEW
@given(st.text(st.characters(exclude_characters="\0\n"), max_size=15))
def test_what_a_process_is_called(name: str) -> None:
    """In /proc: another process chose it, parentheses and all."""
    comm = Path("/proc/self/comm")
    before = comm.read_text()
    for each in (name, "x) Z 1"):
        comm.write_bytes(each.encode("utf-8", "replace")[:15])
        found = procfs.stat_of(os.getpid())
        assert found is not None
        assert found.group == os.getpgrp()
        assert procfs.is_alive(os.getpid())
    comm.write_text(before)
