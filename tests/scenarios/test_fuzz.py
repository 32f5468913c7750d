"""Nonsense without end, on the control socket and from workers: nothing fails, nothing grows.

SOCKETPROTECTOR_SEED repeats what was sent.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from socketprotector.model.control_requests import COMMANDS, LINE_BYTES
from tests.load import Load
from tests.procfs import environment_of, memory_kib
from tests.rounds import rounds
from tests.running import DEADLINE_S
from tests.scenarios.adopting import Chance, served
from tests.scenarios.operating import Operated, Operating

INPUTS = rounds(2_000, 1_000_000)
#: Of one client, before the next one has its turn: one that asks nothing for 30 s is ended.
BATCH = 25
#: What may be asked at random.  `stop` and `upgrade` would end the test.
ASKED = [each for each in COMMANDS if each not in ("stop", "upgrade", "reload", "replace", "hold")]
VALUES: tuple[object, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**300, 0.5, 1e300, float("nan"), ""),
    *("info", "\ud800", "\x00", "x" * 300, [], {}, [[]] * 50, {"a": {"b": []}}),
)
WORDS = (
    *(b"READY=1", b"STOPPING=1", b"STATUS=\xff\x1b[2J", b"STATUS=" + b"s" * 3000, b"WATCHDOG=1"),
    *(b"EXTEND_TIMEOUT_USEC=10", b"EXTEND_TIMEOUT_USEC=-1", b"EXTEND_TIMEOUT_USEC=" + b"9" * 99),
    *(b"BARRIER=1", b"MAINPID=1", b"X_SOCKETPROTECTOR_RETIRE=1", b"ERRNO=x", b"=", b"", b"\0"),
)


def a_line(chance: random.Random) -> bytes:
    """A request, nearly one, or none at all; at least one line."""
    kind = chance.random()
    if kind < 0.3:
        return chance.randbytes(chance.choice((0, 3, 30, 300)))
    if kind < 0.31:
        return b"[" * chance.choice((100, 5000, LINE_BYTES))
    fields: dict[str, object] = {"v": 1, "id": chance.choice(VALUES), "command": "status"}
    if kind < 0.7:
        fields["command"] = chance.choice(ASKED)
        for name in chance.sample(("by", "pid", "generation", "level", "quick", "x"), 1):
            fields[name] = chance.choice(VALUES)
    elif kind < 0.7005:
        fields.update(command="hold", seconds=0.1)
    elif kind < 0.701:
        fields.update(command="scale", to=chance.choice((1, 2, 3)))
    elif kind < 0.7012:
        fields.update(command="reload")
    elif kind < 0.8:
        fields[chance.choice(("v", "id", "command"))] = chance.choice(VALUES)
    line = json.dumps(fields).encode()
    if kind > 0.9:
        at = chance.randrange(len(line))
        line = line[:at] + chance.randbytes(chance.randrange(3)) + line[at + 1 :]
    return line


class Fuzzer:
    """A client of the control socket that comes again whenever it is ended."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        self._path = path
        self._chance = chance
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE_S)
        self._socket.connect(str(self._path))

    def send(self) -> None:
        """Send some lines, whole or cut off in the middle of it all."""
        lines = b"".join(a_line(self._chance) + b"\n" for _ in range(BATCH))
        self._wanted = lines.count(b"\n")
        end = self._chance.random()
        self._stays = end >= 0.03
        if end < 0.02:
            lines, self._wanted = lines[: self._chance.randrange(len(lines))], 0
        elif end < 0.03:
            lines += b"x" * (LINE_BYTES + 1)
            self._wanted += 1
        self._socket.sendall(lines)

    def hear(self) -> int:
        """See that each line is answered; return how many."""
        for answer in self._lines(self._wanted):
            told = json.loads(answer, parse_constant=pytest.fail)
            assert told["v"] == 1
            assert told["ok"] or told["code"] in ("invalid", "unknown", "refused")
        if not self._stays:
            self._socket.close()
            self._connect()
        return self._wanted

    def _lines(self, wanted: int) -> Iterator[bytes]:
        """As many answers; events in between are left out."""
        rest = b""
        while wanted:
            data = self._socket.recv(2**18)
            assert data, "it ended the connection"
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if b'"event":' not in line:
                    wanted -= 1
                    yield line

    def close(self) -> None:
        self._socket.close()


def a_datagram(chance: random.Random) -> bytes:
    """What a worker might say, or never should."""
    kind = chance.random()
    if kind < 0.2:
        return chance.randbytes(chance.choice((0, 1, 100, 5000)))
    return b"\n".join(chance.choices(WORDS, k=chance.randrange(1, 4)))


def address_of_one(web: Operated, chance: random.Random) -> bytes:
    """The notify socket of a worker that serves; empty if it has ended meanwhile."""
    found = web.status()
    workers = [w["pid"] for g in found["generations"] for w in g["workers"] if w["ready_at"]]
    try:
        environment = environment_of(chance.choice(workers))
    except OSError:
        return b""
    return environment.get("NOTIFY_SOCKET", "").encode()


def say_nonsense(notify: socket.socket, address: bytes, chance: random.Random) -> int:
    """Send some datagrams with some descriptors; return how many."""
    for sent in range(BATCH):
        count = chance.choice((0, 0, 0, 0, 1, 2, 250))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"\0\0\0\0" * count)] if count else []
        try:
            notify.sendmsg([a_datagram(chance)], rights, 0, address)
        except (BrokenPipeError, ConnectionRefusedError, FileNotFoundError):
            return sent  # the worker has just ended: its socket is being closed, closed or removed
    return BATCH


@pytest.mark.slow
@pytest.mark.timeout(rounds(600, 6000))  # two seconds, or five minutes, on an idle machine
def test_nonsense_without_end_fails_nothing_and_memory_stays_flat(operated: Operating) -> None:
    chance = Chance().random
    web = operated()
    fuzzers = [Fuzzer(web.path, chance) for _ in range(32)]
    sent, warm = 0, 0
    with (
        ExitStack() as stack,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
        Load(f"127.0.0.1:{web.daemon.port}", concurrency=4) as load,
    ):
        for each in fuzzers:
            stack.callback(each.close)
        notify.settimeout(DEADLINE_S)
        served(load)
        while sent < INPUTS:
            for each in fuzzers:
                each.send()
            if address := address_of_one(web, chance):
                sent += sum(say_nonsense(notify, address, chance) for _ in fuzzers)
            sent += sum(each.hear() for each in fuzzers)
            if not warm and sent > INPUTS / 4:
                warm = memory_kib(web.daemon.pid)
        web.line().ask("release")
        served(load)
    seen, found, now = load.snapshot(), web.status(), memory_kib(web.daemon.pid)
    print(f"{sent} inputs, {seen.connections} connections, {warm} KiB then, {now} KiB now")
    assert seen.failures == ()
    assert found["pid"] == web.daemon.pid
    assert (found["restarts"], found["crashes"], found["lost"]) == (0, 0, 0)
    assert now < 1.3 * warm
