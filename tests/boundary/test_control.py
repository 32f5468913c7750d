"""The control socket's clients: whole lines, half ones, too many, too slow, and gone again.

A real loop and real sockets in one process; the loop turns while a test waits for a fact.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from socketprotector.daemon.control import server
from socketprotector.daemon.control.server import CLIENTS, UNREAD_BYTES, Client, ControlServer
from socketprotector.model import control_requests
from socketprotector.model.control_requests import LINE_BYTES, Request, RequestError, answer
from socketprotector.model.settings import ListenerSettings
from socketprotector.system.listeners import listener_of
from socketprotector.system.loop import Loop
from tests import needs
from tests.boundary.conftest import Turns
from tests.running import DEADLINE_S

GROUP = 54_321  # no user is in it, and it needs no name
NOBODY = 65_534
ANOTHER_USER = needs.ANOTHER_USER
STATUS = b'{"v":1,"command":"status"}\n'


class Desk:
    """A control socket that answers every request with its command, and how often it turned."""

    def __init__(
        self, path: Path, group: int | None = None, status_group: int | None = None
    ) -> None:
        self.path = path
        self.loop = Loop()
        self.turn = 0
        self.asked: list[tuple[int, Request]] = []
        self.answers: Callable[[Client, Request], None] = self._answer
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.bind(str(path))
        sock.listen(CLIENTS * 2)
        path.chmod(0o666)
        found = path.stat()
        settings = ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino)
        self.listener = listener_of(sock.detach(), -1, settings)
        self.acked: list[int] = []
        self.control = ControlServer(
            self.listener,
            self.loop,
            lambda client, request: self.answers(client, request),
            lambda pid: self.acked.append(pid),
            uids=frozenset({os.getuid()}),
            group=group,
            status_group=status_group,
        )
        # Always readable: called once a turn.
        self._ticks = os.eventfd(1)
        self.loop.watch(self._ticks, self._tick)
        self.callers: list[Caller] = []
        self.ticked: Callable[[], None] = lambda: None

    def _tick(self) -> None:
        self.turn += 1
        self.ticked()

    def _answer(self, client: Client, request: Request) -> None:
        self.asked.append((self.turn, request))
        if request.command == "events":
            client.follows = True
        if request.command == "diff":
            raise RequestError("refused", "not here", request.id)
        client.send_line(answer(request.id, {"command": request.command}))

    def turns_until(self, fact: Callable[[], bool], what: str) -> None:
        """Let the loop turn until something is so."""
        until = time.monotonic() + DEADLINE_S

        def look() -> None:
            if fact() or time.monotonic() > until:
                self.loop.running = False
            else:
                self.loop.call_after("look", 1e-6, look)  # the next turn

        self.loop.running = True
        self.loop.call_after("look", 0.0, look)
        self.loop.run()
        assert fact(), f"never came: {what}"

    def rests(self) -> None:
        """Let it do all there is to do now."""
        seen = self.turn
        self.turns_until(lambda: self.turn > seen + 8, "turns")

    def call(self, data: bytes = b"") -> Caller:
        made = Caller(self, data)
        self.callers.append(made)
        return made

    @property
    def clients(self) -> int:
        return len(self.control._clients)

    def end(self) -> None:
        for each in self.callers:
            each.socket.close()
        self.control.close()
        self.loop.unwatch(self._ticks)
        assert not self.loop._callbacks
        left = {"look", "loop-coming"}  # the test's, and the loop's for what was just registered
        assert not set(self.loop._timers) - left
        os.close(self._ticks)
        self.loop.close()
        assert not self.path.exists()


class Caller:
    """A client of the control socket."""

    def __init__(self, desk: Desk, data: bytes) -> None:
        self._desk = desk
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(desk.path))
        self.got = b""
        self.ended = False
        if data:
            self.socket.sendall(data)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def look(self) -> None:
        """Take in what has come."""
        while not self.ended:
            try:
                data = self.socket.recv(65_536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            self.got += data
            self.ended = not data

    def hear(self, lines: int = 1) -> list[dict[str, Any]]:
        """Wait for so many lines, and take them."""

        def there() -> bool:
            self.look()
            return self.got.count(b"\n") >= lines

        self._desk.turns_until(there, f"{lines} lines")
        *found, self.got = self.got.split(b"\n", lines)
        return [json.loads(each) for each in found]

    def hear_end(self) -> None:
        """Wait for the end."""

        def ended() -> bool:
            self.look()
            return self.ended

        self._desk.turns_until(ended, "the end of the connection")


@pytest.fixture
def place() -> Path:
    return Path(os.environ["XDG_RUNTIME_DIR"]) / "control"


@pytest.fixture
def desk(place: Path) -> Iterator[Desk]:
    made = Desk(place)
    yield made
    made.end()


def ok(command: str = "status", request_id: object = None) -> dict[str, Any]:
    return {"v": 1, "id": request_id, "ok": True, "result": {"command": command}}


# -- lines -----------------------------------------------------------------------


def test_a_line_is_answered_with_a_line(desk: Desk) -> None:
    caller = desk.call(b'{"v":1,"id":7,"command":"reload"}\n')

    assert caller.hear() == [ok("reload", 7)]


def test_a_line_that_comes_byte_by_byte_is_one_request(desk: Desk) -> None:
    caller = desk.call()
    for byte in STATUS[:-1]:
        caller.send(bytes([byte]))
        desk.rests()
    assert desk.asked == []

    caller.send(b"\n")

    assert caller.hear() == [ok()]
    assert len(desk.asked) == 1


def test_requests_in_one_packet_are_answered_in_order_and_one_a_turn(desk: Desk) -> None:
    packet = b"".join(b'{"v":1,"id":%d,"command":"status"}\n' % n for n in range(50))
    caller = desk.call(packet + b'{"v":1,"id":50,')

    assert caller.hear(50) == [ok("status", n) for n in range(50)]
    turns = [turn for turn, _ in desk.asked]
    assert len(set(turns[1:])) == 49  # every other client came in between

    caller.send(b'"command":"status"}\n')
    assert caller.hear() == [ok("status", 50)]


def test_several_clients_take_turns(desk: Desk) -> None:
    callers = [desk.call(STATUS * 20) for _ in range(5)]
    desk.turns_until(lambda: desk.clients == 5, "five clients")

    for caller in callers:
        assert caller.hear(20) == [ok()] * 20


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"", "invalid"),
        (b"\0\xff\xfe", "invalid"),
        (b"[" * 60_000, "invalid"),
        (b'{"v":1,"command":"scael"}', "unknown"),
        (b'{"v":1,"command":"diff"}', "refused"),
    ],
)
def test_a_mistake_is_answered_and_the_next_line_is_heard(
    desk: Desk, line: bytes, code: str
) -> None:
    caller = desk.call(line + b"\n" + STATUS)

    wrong, right = caller.hear(2)

    assert (wrong["ok"], wrong["code"]) == (False, code)
    assert right == ok()


def padded(size: int) -> bytes:
    return STATUS.rstrip().ljust(size)


def test_a_line_may_be_so_long_and_no_longer(desk: Desk) -> None:
    assert desk.call(padded(LINE_BYTES) + b"\n").hear() == [ok()]

    for data in (padded(LINE_BYTES + 1) + b"\n", padded(LINE_BYTES + 1), b"x" * 150_000):
        caller = desk.call(data)
        [refused] = caller.hear()
        assert (refused["code"], refused["error"]) == (
            "invalid",
            "a line may have at most 65536 bytes",
        )
        caller.hear_end()
    assert len(desk.asked) == 1


# -- clients that read too little -------------------------------------------------


def say_much(client: Client, request: Request) -> None:
    client.send_line(answer(request.id, {"much": "x" * 300_000}))


def test_a_client_that_reads_no_answers_gets_no_more_until_it_does(desk: Desk) -> None:
    asked: list[Request] = []

    def count(client: Client, request: Request) -> None:
        asked.append(request)
        say_much(client, request)

    desk.answers = count
    caller = desk.call(STATUS * 20)
    desk.turns_until(lambda: bool(asked), "the first request")
    desk.rests()
    assert len(asked) < 5  # the kernel's buffer, and one

    assert len(caller.hear(20)) == 20
    assert len(asked) == 20


def test_one_answer_may_be_longer_than_what_a_client_may_leave_unread(desk: Desk) -> None:
    def say_all(client: Client, request: Request) -> None:
        client.send_line(answer(request.id, {"much": "x" * (UNREAD_BYTES + 1)}))

    desk.answers = say_all

    for found in desk.call(STATUS * 2).hear(2):
        assert len(found["result"]["much"]) > UNREAD_BYTES


def test_a_client_with_too_many_unread_answers_is_ended(desk: Desk) -> None:
    def say_too_much(client: Client, request: Request) -> None:
        for _ in range(20):
            client.send_line(b"x" * 99_999 + b"\n")

    desk.answers = say_too_much
    caller = desk.call(STATUS)

    caller.hear_end()

    assert desk.clients == 0
    assert len(caller.got) < UNREAD_BYTES


def test_a_client_that_never_reads_is_ended_after_a_while(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "IDLE_S", 0.1)
    desk.answers = say_much
    desk.call(STATUS * 20)

    desk.turns_until(lambda: desk.clients == 1, "the client")
    desk.turns_until(lambda: desk.clients == 0, "its end")


# -- events --------------------------------------------------------------------------


def test_events_go_only_to_clients_that_follow_them(desk: Desk) -> None:
    follower, other = desk.call(b'{"v":1,"command":"events"}\n'), desk.call(STATUS)
    assert follower.hear() == [ok("events")]
    assert other.hear() == [ok()]

    desk.control.send_event("info", "ready", {"generation": 1})

    [event] = follower.hear()
    assert event.pop("at") <= time.time()
    assert event == {"v": 1, "event": "ready", "level": "info", "generation": 1}
    other.send(STATUS)
    assert other.hear() == [ok()]
    follower.send(STATUS)  # it may still ask
    assert follower.hear() == [ok()]


def test_events_that_a_client_does_not_read_are_left_out_and_counted(desk: Desk) -> None:
    reader, sleeper = (desk.call(b'{"v":1,"command":"events"}\n') for _ in range(2))
    for each in (reader, sleeper):
        each.hear()
    number = 0
    while not any(each._dropped for each in desk.control._clients.values()):
        number += 1
        desk.control.send_event("info", "spam", {"number": number, "text": "x" * 10_000})
        assert reader.hear()[0]["number"] == number
        assert number < 1000
    for _ in range(9):
        desk.control.send_event("info", "spam", {"number": 0, "text": "x" * 10_000})
    reader.hear(9)

    kept = sleeper.hear(number - 1)
    assert [each["number"] for each in kept] == list(range(1, number))
    assert not any("dropped" in each for each in kept)
    desk.control.send_event("info", "ready", {})
    desk.control.send_event("info", "drained", {})
    first, second = sleeper.hear(2)

    assert (first["event"], first["dropped"]) == ("ready", 10)
    assert (second["event"], "dropped" in second) == ("drained", False)


def test_a_follower_that_has_gone_is_sent_nothing(desk: Desk) -> None:
    follower = desk.call(b'{"v":1,"command":"events"}\n')
    follower.hear()
    follower.socket.close()

    for _ in range(3):
        desk.control.send_event("info", "ready", {})  # before the loop has seen its end

    desk.turns_until(lambda: desk.clients == 0, "its end")


# -- how many, and how long -------------------------------------------------------------


def test_so_many_clients_and_no_more_until_one_leaves(desk: Desk) -> None:
    callers = [desk.call() for _ in range(CLIENTS)]
    desk.turns_until(lambda: desk.clients == CLIENTS, "all of them")

    one_more = desk.call(STATUS)
    [refused] = one_more.hear()
    assert (refused["code"], refused["error"]) == (
        "busy",
        "256 clients are connected already; try again after a client leaves",
    )
    one_more.hear_end()

    callers[17].socket.close()
    desk.turns_until(lambda: desk.clients < CLIENTS, "room for another")
    assert desk.call(STATUS).hear() == [ok()]
    callers[100].send(STATUS)
    assert callers[100].hear() == [ok()]


def test_a_client_that_asks_nothing_is_ended_and_half_a_line_is_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "IDLE_S", 0.1)
    silent, slow = desk.call(), desk.call()

    def trickle() -> None:
        try:
            slow.send(b"{")
        except OSError:
            return
        desk.loop.call_after("trickle", 0.01, trickle)

    trickle()
    silent.hear_end()
    slow.hear_end()

    desk.loop.cancel("trickle")
    assert desk.clients == 0


def test_a_client_that_asks_or_follows_stays(
    turns: Turns, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.ticked = turns.tick
    monkeypatch.setattr(server, "IDLE_S", 0.2)
    follower, asker = desk.call(b'{"v":1,"command":"events"}\n'), desk.call(STATUS)
    follower.hear()
    for _ in range(3):
        silent = desk.call()  # as long as this one is allowed
        asker.hear()
        silent.hear_end()
        asker = desk.call(STATUS)

    desk.control.send_event("info", "ready", {})

    assert follower.hear()[0]["event"] == "ready"


# -- which users are heard ----------------------------------------------------------------


def as_nobody(
    desk: Desk, group: int = NOBODY, groups: tuple[int, ...] = (), request: bytes = STATUS
) -> dict[str, Any]:
    """Ask from a process of user nobody; return what it heard, {} for the end alone."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setgid(group)
            os.setuid(NOBODY)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(desk.path))
                try:
                    client.sendall(request)
                except BrokenPipeError:
                    pass  # ended already; what it was told can still be read
                os.write(send, client.makefile("rb").readline())
        finally:
            os._exit(0)
    os.close(send)
    ended = os.pidfd_open(child)
    desk.turns_until(lambda: bool(select.select([ended], [], [], 0)[0]), "its end")
    os.waitpid(child, 0)
    os.close(ended)
    with open(receive, "rb") as said:
        found: dict[str, Any] = json.loads(said.read() or "{}")
    return found


@ANOTHER_USER
def test_a_stranger_gets_the_reason_and_is_ended(desk: Desk) -> None:
    refused = as_nobody(desk)

    assert (refused["code"], refused["error"]) == ("denied", "permission denied")
    assert desk.clients == 0
    assert desk.asked == []


@ANOTHER_USER
def test_a_member_of_the_group_is_heard_whichever_of_its_groups_that_is(place: Path) -> None:
    desk = Desk(place, group=GROUP)
    try:
        assert as_nobody(desk, group=GROUP) == ok()
        assert as_nobody(desk, groups=(1, 2, GROUP)) == ok()
        assert as_nobody(desk)["code"] == "denied"
        assert as_nobody(desk, groups=(1, GROUP + 1))["code"] == "denied"
        # More than there is room for: then it cannot be told.
        assert as_nobody(desk, groups=tuple(range(1, 2000)))["code"] == "denied"
        assert as_nobody(desk, group=GROUP, groups=tuple(range(1, 2000))) == ok()
        assert desk.call(STATUS).hear() == [ok()]
    finally:
        desk.end()


@ANOTHER_USER
def test_a_member_of_the_status_group_may_look_and_change_nothing(place: Path) -> None:
    desk = Desk(place, group=GROUP, status_group=GROUP + 1)

    def ask(command: str, *groups: int) -> dict[str, Any]:
        others: dict[str, dict[str, Any]] = {
            "stop": {"quick": True},
            "lame-duck": {"on": True},
            "reload": {"dry_run": True},
            "log-level": {"level": "info"},
            "promote": {"now": True},
            "deploy": {"release": "1"},
            "rollback": {},
            "upgrade": {},
        }
        first = list(control_requests.COMMANDS[command].arguments)[:1]
        arguments = others.get(command, dict.fromkeys(first, 1))
        asked = {"v": 1, "id": 3, "command": command, **arguments}
        return as_nobody(desk, groups=groups, request=json.dumps(asked).encode() + b"\n")

    try:
        for command in control_requests.COMMANDS:
            found = ask(command, GROUP + 1)
            if command in control_requests.STATUS_COMMANDS:
                assert found == ok(command, 3)
            else:
                assert (found["id"], found["code"]) == (3, "denied")
                assert found["error"] == (
                    f"{command}: members of --status-group may use only status, history, "
                    "releases, events"
                )
        asked = {request.command for _, request in desk.asked}
        assert asked == {*control_requests.STATUS_COMMANDS}
        # Nor may it say for a worker that this is ready.
        ack = b'{"command":"worker:ack","pid":1}\n'
        assert as_nobody(desk, groups=(GROUP + 1,), request=ack)["code"] == "invalid"
        assert desk.acked == []
        assert as_nobody(desk, groups=(GROUP,), request=ack) == {}
        assert desk.acked == [1]
        # A member of both groups may do everything.
        assert ask("reopen", GROUP, GROUP + 1) == ok("reopen", 3)
        assert as_nobody(desk)["code"] == "denied"
    finally:
        desk.end()


# -- scarcity, and clients that vanish ----------------------------------------------------


def test_out_of_descriptors_it_accepts_by_a_timer_and_does_not_spin(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_AGAIN_S", 0.05)
    caller = desk.call(STATUS)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as scarce:
            os.dup(0)
        assert scarce.value.errno == errno.EMFILE
        desk.turns_until(
            lambda: desk.listener.fileno() not in desk.loop._callbacks, "no listener is watched"
        )
        for _ in range(3):  # it tries again, and gives up again
            due = desk.loop.due(("control", "again"))
            desk.turns_until(
                lambda due=due: desk.loop.due(("control", "again")) not in (None, due),  # type: ignore[misc]
                "another try",
            )
        assert desk.clients == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    assert caller.hear() == [ok()]


def test_clients_may_vanish_in_the_middle_of_anything(desk: Desk) -> None:
    """Whole requests, halves, many, unread answers, events; closed, or closed for one way."""
    seed = int(os.environ.get("SOCKETPROTECTOR_SEED") or random.SystemRandom().getrandbits(32))
    print(f"SOCKETPROTECTOR_SEED={seed}")
    chance = random.Random(seed)
    desk.answers = lambda client, request: (
        say_much(client, request) if chance.random() < 0.2 else desk._answer(client, request)
    )
    words = (
        STATUS,
        STATUS * 30,
        STATUS[:9],
        b"\n" * 100,
        b'{"v":1,"command":"events"}\n',
        b"x" * 70_000,
        b"\xff\n",
    )
    callers: list[Caller] = []
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(600):
        act = chance.random()
        if act < 0.3 or not callers:
            callers.append(desk.call())
            desk.callers.pop()
        each = chance.choice(callers)
        if act < 0.6:
            try:
                each.socket.send(chance.choice(words), socket.MSG_DONTWAIT)
            except OSError:
                pass  # ended by the other side, or full
        elif act < 0.7:
            each.look()
        elif act < 0.75:
            desk.control.send_event("info", "spam", {"text": "x" * chance.choice((10, 100_000))})
        elif act < 0.8:
            each.socket.shutdown(chance.choice((socket.SHUT_WR, socket.SHUT_RD)))
        elif act < 0.95:
            each.socket.close()
            callers.remove(each)
        else:
            desk.rests()
    for each in callers:
        each.socket.close()

    desk.turns_until(lambda: desk.clients == 0, "the end of all")
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert desk.call(STATUS).socket.fileno() >= 0
    desk.answers = desk._answer
    assert desk.callers[-1].hear() == [ok()]


def test_at_the_end_all_are_ended_and_the_file_is_removed(place: Path) -> None:
    desk = Desk(place)
    callers = [desk.call(), desk.call(STATUS[:5]), desk.call(STATUS * 99)]
    desk.turns_until(lambda: desk.clients == 3, "three clients")

    desk.control.close()

    assert not place.exists()
    for each in callers:
        each.look()
        assert each.ended
    desk.control._clients.clear()
    desk.listener.sockets[0] = socket.socket()  # for end(), which closes it once more
    desk.end()


def test_at_the_end_what_has_been_asked_is_answered(desk: Desk) -> None:
    """Also of those that have come back to a program which ends before it turns to them."""
    known = desk.call()
    desk.turns_until(lambda: desk.clients == 1, "the client")
    known.socket.sendall(STATUS + STATUS)
    waiting = desk.call(b'{"v":1,"command":"events"}\n' + STATUS + b'{"half')

    desk.control.finish()

    desk.control.send_event("info", "stopped", {})
    heard = [
        [json.loads(line) for line in each.socket.recv(65536).splitlines()]
        for each in (known, waiting)
    ]
    said = [[each.get("event") or each["result"]["command"] for each in lines] for lines in heard]
    assert said == [["status", "status"], ["events", "status", "stopped"]]


def test_at_the_end_too_nothing_after_a_line_that_is_too_long_is_carried_out(desk: Desk) -> None:
    line = padded(LINE_BYTES + 1)
    long = desk.call(line[:10_000])
    desk.turns_until(lambda: desk.clients == 1, "the client")
    desk.rests()
    long.send(line[10_000:] + b"\n" + STATUS)

    desk.control.finish()

    long.look()
    assert [json.loads(each)["code"] for each in long.got.splitlines()] == ["invalid"]
    assert long.ended
    assert desk.asked == []


def test_at_the_end_too_a_client_that_is_being_ended_is_heard_no_more(desk: Desk) -> None:
    def fill(client: Client, _: Request) -> None:
        with suppress(BlockingIOError):
            while True:
                client.sock.send(b"x" * 4096, socket.MSG_DONTWAIT)

    desk.answers = fill
    caller = desk.call(STATUS + padded(LINE_BYTES + 1) + b"\n" + STATUS)

    def is_ending() -> bool:
        return any(each._ending for each in desk.control._clients.values())

    desk.turns_until(is_ending, "a refusal for which there is no room")
    desk.answers = desk._answer
    caller.send(STATUS)

    desk.control.finish()

    assert desk.asked == []


def test_at_the_end_too_a_client_that_has_reported_a_worker_is_heard_no_more(desk: Desk) -> None:
    desk.call(b'{"command":"worker:ack", "pid":7}\n' + STATUS)

    desk.control.finish()

    assert (desk.acked, desk.asked) == ([7], [])


# -- out of memory -------------------------------------------------------------


def test_a_client_for_which_there_is_no_memory_ends_alone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `ulimit -v` it ended the protector, and the service with it."""
    parse = control_requests.parse

    def fails(line: bytes) -> Request:
        if b"large" in line:
            raise MemoryError
        return parse(line)

    monkeypatch.setattr(control_requests, "parse", fails)
    good, bad = desk.call(), desk.call(b'{"v":1,"command":"large"}\n')
    bad.hear_end()

    good.send(STATUS)

    assert good.hear() == [ok()]
    assert desk.clients == 1


def test_a_client_that_cannot_be_read_for_lack_of_memory_ends_alone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = desk.call(), desk.call()

    def fails(*_: object) -> bytes:
        raise MemoryError

    with monkeypatch.context() as scarce:
        scarce.setattr("socketprotector.daemon.control.server.read_now", fails)
        bad.send(STATUS)
        bad.hear_end()

    good.send(STATUS)

    assert good.hear() == [ok()]
    assert desk.clients == 1


def test_a_follower_for_whose_event_there_is_no_memory_ends_and_nothing_is_raised(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = desk.call(b'{"v":1,"command":"events"}\n')
    follower.hear()

    def fails(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(control_requests, "event", fails)
    desk.control.send_event("info", "ready", {})

    follower.hear_end()
    assert desk.clients == 0


def test_a_command_that_runs_out_of_memory_half_way_is_no_matter_of_its_client(
    desk: Desk,
) -> None:
    """What it has changed may be half done: that is for the next program, which has the state."""

    def fails(*_: object) -> None:
        raise MemoryError

    desk.answers = fails
    desk.call(STATUS)

    with pytest.raises(MemoryError):
        desk.rests()
