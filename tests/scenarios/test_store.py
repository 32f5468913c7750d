"""systemd's file descriptor store, played by the test as sd_notify(3) and sd_listen_fds(3) say."""

from __future__ import annotations

import os
import random
import re
import select
import shutil
import signal
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from socketprotector.system.sd_notify import parse
from tests.load import Load
from tests.running import COMMAND, DEADLINE_S, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import ROUNDS, Chance, served
from tests.scenarios.tools import (
    EITHER_HANDOFF,
    Client,
    Gate,
    Release,
    children_of,
    hold,
    kinds_of,
    pid_in,
    spawned,
    worker,
)

MANY = worker("many")
#: Moves the descriptors 1000, 1001, ... to 3, 4, ..., tells whose they are, and executes.
PASS_ON = """
import os, resource, sys
count = int(sys.argv[1])
for place in range(count):
    os.dup2(1000 + place, 3 + place)
    os.close(1000 + place)
os.environ["LISTEN_PID"] = str(os.getpid())
if limit := os.environ.pop("TEST_NOFILE", ""):  # LimitNOFILE=, which is set before
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), hard))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def same_socket(one: int, other: int) -> bool:
    """Whether two descriptors are of the same socket; the ends of a pipe are two files."""
    found = os.fstat(one)
    return stat.S_ISSOCK(found.st_mode) and os.path.samestat(found, os.fstat(other))


class Service:
    """One unit: its notify socket, its descriptor store, and its main process."""

    def __init__(
        self, folder: Path, environment: dict[str, str], options: tuple[str, ...] = ()
    ) -> None:
        """options: in front of those that the command is given."""
        self.options = options
        self.address = str(folder / "notify")
        self.pid_file = folder / "pid"
        self.environment = environment
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind(self.address)
        self.socket.setblocking(False)
        self.store: dict[str, int] = {}
        self.sockets: dict[str, int] = {}  # of a .socket unit, which are not in the store
        self.said: list[dict[str, str]] = []
        self.started: list[Protector] = []
        self.random = random.Random(1)
        # It listens all the time, as the real one does: a datagram socket queues but a few.
        self.lock = threading.RLock()
        self.wake = os.eventfd(0, os.EFD_CLOEXEC)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self) -> None:
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        poll.register(self.wake, select.POLLIN)
        while self.wake not in [fd for fd, _ in poll.poll()]:
            self.hear()

    @property
    def main(self) -> Protector:
        return self.started[-1]

    def start(self, *words: str | Path, under: tuple[str, ...] = ()) -> Protector:
        """Start the command with all that it is passed, in an order of its own.

        under: what executes it in its own place.
        """
        passed = self.sockets | self.store
        names = list(passed)
        self.random.shuffle(names)
        high = []
        for place, name in enumerate(names):
            os.dup2(passed[name], 1000 + place, inheritable=True)
            high.append(1000 + place)
        # Without it we are somebody who listens, but is not known to keep anything over a stop.
        nobody_known = {"INVOCATION_ID": ""}
        environment = {**nobody_known, **self.environment, "NOTIFY_SOCKET": self.address}
        if names:
            environment |= {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
        python = COMMAND[0]
        self.started.append(
            Protector(
                ["--pid-file", str(self.pid_file), *self.options, *(str(word) for word in words)],
                environment,
                through=(*under, python, "-c", PASS_ON, str(len(names))),
                pass_fds=high,
            )
        )
        for fd in high:
            os.close(fd)
        return self.main

    def hear(self) -> None:
        """Take in what was said."""
        with self.lock:
            while self.hear_one():
                pass

    def hear_one(self) -> bool:
        try:
            data, ancillary, _, _ = self.socket.recvmsg(4096, 1024, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        fds = [
            fd
            for _, kind, content in ancillary
            if kind == socket.SCM_RIGHTS
            for (fd,) in struct.iter_unpack("i", content)
        ]
        fields = parse(data)
        self.said.append(fields)
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTORE") == "1":
            assert re.fullmatch(r"[ -9;-~]{1,255}", name), "no name for systemd"
            assert fields.get("FDPOLL") == "0", f"{name} would be dropped when it hangs up"
            [fd] = fds
            if any(same_socket(fd, each) for each in self.store.values()):
                os.close(fd)  # it is there, under the name that it has
                return True
            if name in self.store:
                os.close(self.store.pop(name))
            self.store[name] = fd
        elif fields.get("FDSTOREREMOVE") == "1":
            assert not fds
            if name in self.store:
                os.close(self.store.pop(name))
        else:
            assert not fds
        return True

    def wait_for(self, name: str, value: str = "1") -> dict[str, str]:
        """Hear until NAME=VALUE was said after the last such wait; return that message."""
        found: list[dict[str, str]] = []

        def heard() -> bool:
            while self.said and not found:
                fields = self.said.pop(0)
                if fields.get(name) == value:
                    found.append(fields)
            return bool(found)

        eventually(heard, f"{name}={value}")
        return found[0]

    def kill(self) -> None:
        """SIGKILL the main process; what it had said before counts."""
        self.main.process.kill()
        self.main.process.wait(DEADLINE_S)
        self.hear()

    def stop(self) -> None:
        """As `systemctl stop`: in order, and then the store is emptied."""
        self.main.stop()
        self.drop()

    def drop(self) -> None:
        """As systemd does where no start waits."""
        with self.lock:
            self.hear()
            for fd in self.store.values():
                os.close(fd)
            self.store.clear()

    def restart(self, *words: str | Path) -> Protector:
        """As `systemctl restart`: a stop in order, after which a start waits."""
        self.main.stop()
        self.hear()
        self.said.clear()
        return self.start(*words)

    def close(self) -> None:
        for each in self.started:
            each.end()
            print(f"--- log of protector {each.pid} ---\n{each.log.text()}")
        os.eventfd_write(self.wake, 1)
        self.thread.join(DEADLINE_S)
        os.close(self.wake)
        self.drop()
        for fd in self.sockets.values():
            os.close(fd)
        self.socket.close()


@pytest.fixture
def service(
    tmp_path: Path, marked_environment: dict[str, str], handed_over: tuple[str, ...]
) -> Iterator[Service]:
    made = Service(tmp_path, marked_environment, handed_over)
    yield made
    made.close()


def wait_stored(service: Service, wanted: set[str]) -> None:
    try:
        eventually(lambda: set(service.store) == wanted, "the same in the store")
    finally:
        print("in the store and not wanted:", sorted(set(service.store) - wanted))
        print("wanted and not in the store:", sorted(wanted - set(service.store)))


OWN = {"sp.settings", "sp.state", "sp.pidfile", "sp.control", "sp.notify", "sp.listener.0"}


def of_generation(number: int, *workers: int) -> set[str]:
    found = {f"sp.channel.{number}.{what}" for what in ("read", "write", "board")}
    for each in workers:
        found |= {f"sp.worker.{each}.{what}" for what in ("process", "notify", "line")}
    return found


def test_what_is_stored_is_what_lives_and_at_the_end_nothing_is(service: Service) -> None:
    service.start("127.0.0.1:0", "--", *MANY)
    service.wait_for("READY")
    wait_stored(service, OWN | of_generation(1, 1))

    service.main.reload()
    wait_stored(service, OWN | of_generation(2, 2))

    service.main.stop()
    wait_stored(service, set())
    assert not service.pid_file.exists()


def test_killed_and_started_again_it_goes_on(service: Service) -> None:
    words = ("127.0.0.1:0", "--workers", "2", "--", *MANY)
    first = service.start(*words).ready()
    service.wait_for("READY")
    port, workers = first.port, spawned(first)
    inode = service.pid_file.stat().st_ino
    with Client(("127.0.0.1", port)) as held:
        holder = pid_in(held.ask())

        service.kill()
        waiting = [Client(("127.0.0.1", port), f"hello {number}") for number in range(5)]
        second = service.start(*words)

        ready = service.wait_for("READY")
        assert ready["MAINPID"] == str(second.pid)
        for number, client in enumerate(waiting):
            line = client.hear()
            assert line.endswith(f" hello {number}")
            assert pid_in(line) in workers
            client.close()
        assert pid_in(held.ask()) == holder in workers
    assert service.pid_file.read_text() == f"{second.pid}\n"
    assert service.pid_file.stat().st_ino == inode

    os.kill(workers[0], signal.SIGKILL)  # no child of its own any more, and nobody to tell
    second.log.wait_for("event=worker-ready generation=1 worker=3")
    second.reload()
    assert wait_gone(workers) == []
    second.stop()
    wait_stored(service, set())


def test_what_was_queued_with_workers_that_stand_still_is_served(service: Service) -> None:
    words = ("--queue", "6", "127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    [pid] = spawned(first)
    hold(pid)
    clients = [Client(("127.0.0.1", first.port), f"hello {number}") for number in range(20)]

    eventually(lambda: "sp.hand.1" in service.store, "a connection in hand")
    service.kill()
    second = service.start(*words)
    second.log.wait_for("event=route")
    os.kill(pid, signal.SIGCONT)

    for number, client in enumerate(clients):
        assert client.hear() == f"[{pid}] hello {number}"
        client.close()
    wait_stored(service, OWN | of_generation(1, 1))
    second.stop()


def test_no_more_is_stored_than_systemd_can_pass_on_below_the_soft_limit(service: Service) -> None:
    service.environment["TEST_NOFILE"] = "100"
    words = ("127.0.0.1:0", "--workers", "12", "--", *MANY)  # 45 descriptors
    first = service.start(*words).ready()
    service.wait_for("READY")
    first.log.wait_for("event=store-full")
    mark = len(first.log.seen)
    first.signal(signal.SIGUSR2)
    first.log.wait_for("event=adopted", after=mark)
    first.reload()
    assert len(service.store) <= 36

    service.kill()
    second = service.start(*words)
    service.wait_for("READY")
    assert ask(("127.0.0.1", first.port))
    second.stop()
    wait_stored(service, set())


# 6 are its own, 3 a generation's, 3 each worker's: no room for a channel, for half of one, for any
# worker, for half of one, for one more than two generations need.
@EITHER_HANDOFF
@pytest.mark.parametrize("room", [6, 8, 10, 14, 30])
def test_with_a_store_that_is_full_it_serves_after_a_kill_all_the_same(
    service: Service, room: int
) -> None:
    service.environment["FDSTORE"] = str(room)
    words = ("127.0.0.1:0", "--workers", "3", "--", *MANY)
    first = service.start(*words).ready()
    service.wait_for("READY")
    with Client(("127.0.0.1", first.port)) as held:
        held.ask()  # so that the generation before the last one is still there
        first.reload()
        assert (first.log.count("event=store-full") > 0) == (room < 30)
        workers = spawned(first)
        service.kill()
        assert len(service.store) <= room
        service.said.clear()  # READY=1 of the reload is among it
        waiting = Client(("127.0.0.1", first.port))
        second = service.start(*words)
        service.wait_for(
            "READY"
        )  # not only an answer: a worker that it does not know gives one, too

        with waiting:
            waiting.ask()
    second.stop()
    assert wait_gone(workers) == []
    wait_stored(service, set())


@pytest.mark.slow
def test_killed_under_load_again_and_again_it_loses_one_connection_a_time_at_most(
    service: Service,
) -> None:
    chance = Chance()
    words = ("127.0.0.1:0", "--", *MANY)
    port = service.start(*words).ready().port
    service.wait_for("READY")
    lost = []
    with Load(f"127.0.0.1:{port}", concurrency=16) as load:
        for _ in range(ROUNDS // 2):
            served(load)
            failed = len(load.snapshot().failures)
            chance.moment(0.05)
            service.kill()
            service.start(*words)
            service.wait_for("READY")
            served(load, 32)
            lost.append(len(load.snapshot().failures) - failed)
    seen = load.snapshot()

    print(f"{len(lost)} kills, {sum(lost)} connections lost, {seen.connections} served")
    assert max(lost) <= 1
    assert set(seen.pids) == set(spawned(service.started[0]))
    wait_stored(service, OWN | of_generation(1, 1))
    service.main.stop()
    wait_stored(service, set())


def test_killed_during_a_reload_the_new_generation_takes_over(
    service: Service, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*MANY)
    words = ("127.0.0.1:0", "--", release.path)
    first = service.start(*words).ready()
    gate = Gate(tmp_path / "gate")
    release.becomes(*gate.before(*MANY))
    first.signal(signal.SIGHUP)
    [new] = spawned(first, 2)
    wait_stored(service, OWN | of_generation(1, 1) | of_generation(2, 2))
    port = first.port
    first.log.wait_for("event=reopened", after=first.signal(signal.SIGUSR1))
    service.said.clear()

    service.kill()
    second = service.start(*words)

    service.wait_for("READY")
    service.wait_for("RELOADING")
    gate.open()
    assert service.wait_for("READY")["STATUS"] == "generation 2 serves"
    assert pid_in(ask(("127.0.0.1", port))) == new
    second.stop()


def test_killed_while_it_stops_it_goes_on_to_stop(service: Service) -> None:
    words = ("127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    with Client(("127.0.0.1", first.port)) as held:
        pid = pid_in(held.ask())
        first.signal(signal.SIGTERM)
        service.wait_for("STOPPING")
        service.kill()

        second = service.start(*words)
        service.wait_for("STOPPING")
        assert pid_in(held.ask()) == pid
    assert second.wait() == 0
    wait_stored(service, set())
    assert not service.pid_file.exists()


@pytest.mark.skipif(
    shutil.which("strace") is None,
    reason="NOT CHECKED: strace is not installed (tools/install-packages strace)",
)
def test_told_to_stop_before_it_has_gone_on_it_goes_on_to_stop(service: Service) -> None:
    words = ("127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    with Client(("127.0.0.1", first.port)) as held:
        pid = pid_in(held.ask())
        service.wait_for("READY")
        service.kill()

        # Nobody has blocked it for a process that systemd starts, and no handler stands yet.
        early = ("strace", "-D", "-qq", "-o", "/dev/null", "-e", "inject=chdir:signal=TERM:when=1")
        second = service.start(*words, under=early)
        service.wait_for("STOPPING")
        assert pid_in(held.ask()) == pid
    assert second.wait() == 0
    assert wait_gone([pid]) == []
    wait_stored(service, set())


def test_a_state_it_cannot_read_is_refused_and_the_workers_finish(service: Service) -> None:
    words = ("127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    service.wait_for("READY")
    wait_stored(service, OWN | of_generation(1, 1))
    service.kill()
    for slot in (0, 1):
        os.pwrite(service.store["sp.state"], b"\0", slot * 64 * 1024 * 1024)

    second = service.start(*words)

    assert second.wait() == 111
    assert second.log.count("no whole state")
    assert not second.log.count("During handling")
    wait_stored(service, set())  # so that the next start is a fresh one
    third = service.start("127.0.0.1:0", "--", *MANY).ready()
    assert wait_gone(spawned(first)) == []
    third.stop()


def test_settings_of_a_newer_program_are_refused_in_words(service: Service) -> None:
    words = ("127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    service.wait_for("READY")
    wait_stored(service, OWN | of_generation(1, 1))
    service.kill()
    settings = os.pread(service.store["sp.settings"], 1 << 20, 0)
    newer = settings.replace(b'{"format": 2', b'{"format": 3')
    os.pwrite(service.store["sp.settings"], newer, 0)

    second = service.start(*words)

    assert second.wait() == 111
    assert second.log.text() == (
        "the settings are a newer program's (format 3, this one knows up to 2): "
        "start that one, or stop and start afresh"
    )
    os.pwrite(service.store["sp.settings"], settings, 0)
    third = service.start(*words)  # nothing has been touched
    service.wait_for("READY")
    assert pid_in(ask(("127.0.0.1", first.port))) == spawned(first)[0]
    third.stop()


def test_nothing_is_left_open_that_was_stored_and_not_known(service: Service) -> None:
    words = ("127.0.0.1:0", "--", *MANY)
    service.start(*words).ready()
    service.wait_for("READY")
    wait_stored(service, OWN | of_generation(1, 1))
    service.kill()
    for name in ("sp.worker.9.line", "sp.channel.7.read", "sp.hand.5", "web"):
        service.store[name] = os.dup(service.store["sp.worker.1.line"])

    second = service.start(*words)

    service.wait_for("READY")
    wait_stored(service, OWN | of_generation(1, 1) | {"web"})  # not its own to remove
    targets = kinds_of(second.pid)
    second.log.wait_for("event=reopened", after=second.signal(signal.SIGUSR1))
    service.kill()
    third = service.start(*words)
    service.wait_for("READY")
    third.log.wait_for("event=reopened", after=third.signal(signal.SIGUSR1))
    assert kinds_of(third.pid)["socket"] == targets["socket"]
    assert children_of(third.pid) == []
    third.stop()
