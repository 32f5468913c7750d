"""Lines of the table about many workers, and about little processor time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Figure, Scale, alternately, ratio
from bench.processes import (
    CannotMeasure,
    Started,
    ask,
    built,
    cpu_ns,
    descendants,
    free_port,
    protector,
)
from bench.rows import column, load, middle_of, nothing_failed
from bench.survive_rows import guarded

COUNTS = (2, 32, 128, 600)
LIMIT_S = 120.0
CPU = Path("/sys/fs/cgroup/cpu")


class _Many(Started):
    """Hundreds of workers take their time to start."""

    def _wait_until_it_answers(self) -> None:
        until_s = time.monotonic() + LIMIT_S
        while True:
            try:
                ask(self.address, timeout_s=LIMIT_S)
                return
            except OSError as error:
                if time.monotonic() > until_s:
                    said = self.said()
                    self.close()
                    raise CannotMeasure(f"{self.address} never answered: {said}") from error
                time.sleep(0.02)


class Asker:
    """Connects one by one and notes the longest wait."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._to = host, int(port)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest_ms = 0.0
        self.failed = 0

    def _run(self) -> None:
        while not self._over.wait(0.002):
            begun_s = time.monotonic()
            try:
                with socket.create_connection(self._to, LIMIT_S) as sock:
                    sock.sendall(b"ping\n")
                    while sock.recv(64):
                        pass
            except OSError:
                self.failed += 1
            self.longest_ms = max(self.longest_ms, (time.monotonic() - begun_s) * 1e3)

    def during(self, act: Callable[[], object]) -> tuple[float, float]:
        """Do something; return its seconds and the longest wait in milliseconds meanwhile."""
        self._thread.start()
        begun_s = time.monotonic()
        try:
            act()
        finally:
            took_s = time.monotonic() - begun_s
            self._over.set()
            self._thread.join()
        return took_s, self.longest_ms


def _until(log: Path, event: str, count: int) -> None:
    until_s = time.monotonic() + LIMIT_S
    while log.read_text().count(f" event={event} ") < count:
        if time.monotonic() > until_s:
            raise CannotMeasure(f"{event} {count} times: {log.read_text()[-500:]}")
        time.sleep(0.01)


@dataclass(frozen=True)
class Took:
    """What one of them took, in milliseconds; the first and the last two of processor time."""

    cpu: float
    longest_wait: float = 0.0  # of a client, by the clock
    away: float = 0.0  # of the loop from its connections, no matter what keeps the machine busy
    start: float = 0.0  # of a new program until it looks at them first


def _away(record: Path, pid: int, since_ns: int) -> tuple[float, float]:
    """Return the longest times that away.c has noted of a process: at work, and at its start."""
    longest = [0.0, 0.0]
    if record.exists():  # else each was shorter than a millisecond
        for line in record.read_text().splitlines():
            whose, at_ns, away_ns, at_start = map(int, line.split())
            if whose == pid and at_ns >= since_ns:
                longest[at_start] = max(longest[at_start], away_ns / 1e6)
    return longest[0], longest[1]


def _one_count(count: int, folder: Path) -> dict[str, Took]:
    """Return what start, reload, upgrade and kill take."""
    log, record = folder / f"log.{count}", folder / f"away.{count}"
    log.touch()
    address = f"127.0.0.1:{free_port()}"
    program = str(Path(sys.executable).parent / "SocketProtector")
    command = [
        *(program, "-f", "--guard", "--workers", str(count), "--start-timeout", f"{LIMIT_S:g}"),
        *("--log-file", str(log), address, "--", built("many")),
    ]
    env = {"LD_PRELOAD": built("away", preloaded=True), "BENCH_AWAY": str(record)}
    seen: dict[str, Took] = {}
    with _Many(command, address, env, []) as started:
        _until(log, "ready", 1)
        seen["start"] = Took(cpu_ns(guarded(started.pid)) / 1e6)

        def reload() -> None:
            os.kill(started.pid, signal.SIGHUP)
            _until(log, "drained", 1)

        def upgrade() -> None:
            os.kill(guarded(started.pid), signal.SIGUSR2)
            _until(log, "resumed", 1)

        def kill() -> None:
            os.kill(guarded(started.pid), signal.SIGKILL)
            _until(log, "resumed", 2)

        for act in (reload, upgrade, kill):
            pid = guarded(started.pid)
            before, since_ns = cpu_ns(pid), time.monotonic_ns()
            _, longest_ms = Asker(address).during(act)
            now = guarded(started.pid)
            spent_ms = (cpu_ns(now) - (before if now == pid else 0)) / 1e6
            seen[act.__name__] = Took(spent_ms, longest_ms, *_away(record, now, since_ns))
    return seen


def _spawns_alone(count: int) -> float:
    """Return the longest wait, in ms, beside as many starts of the same program without us."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        fd = listener.fileno()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {**os.environ, "SOCKETPROTECTOR_CHANNEL": str(theirs.fileno())}
        env.pop("NOTIFY_SOCKET", None)
        children: list[int] = []
        os.set_inheritable(theirs.fileno(), True)
        with ours, theirs, Started([built("many")], address, {"BENCH_LISTENER": str(fd)}, [fd]):

            def spawns() -> None:
                for _ in range(count):
                    children.append(os.posix_spawn(built("many"), ["many"], env))  # noqa: PERF401

            _, longest_ms = Asker(address).during(spawns)
            ours.shutdown(socket.SHUT_RDWR)
            for pid in children:
                os.waitpid(pid, 0)
    return longest_ms


def workers(scale: Scale) -> list[Figure]:
    """Start, reload, upgrade and kill under --guard: CPU a worker, and how long clients wait."""
    counts = (2, 32) if scale.quick else COUNTS
    with tempfile.TemporaryDirectory() as name:
        found = {count: _one_count(count, Path(name)) for count in counts}
    alone = {count: _spawns_alone(count) for count in counts}
    figures = []
    few, many = counts[-2:]
    for what in ("start", "reload", "upgrade", "kill"):
        each = {count: seen[what].cpu / count for count, seen in found.items()}
        grows = each[many] / each[few]
        figures.append(
            Figure(
                f"{what} under --guard: CPU a worker, {many} workers / {few}",
                f"{grows:.2f}",
                "<= 1.3",
                "1.0",
                grows <= 1.3,
                [
                    *(
                        f"{n}: {each[n]:.2f} ms a worker, {found[n][what].cpu:.0f} ms"
                        for n in counts
                    ),
                    "longest wait of a client meanwhile: "
                    + ", ".join(f"{n}: {found[n][what].longest_wait:.0f} ms" for n in counts),
                    "beside as many starts of the same program without us: "
                    + ", ".join(f"{n}: {alone[n]:.0f} ms" for n in counts),
                ],
            )
        )
    away = {n: max(took.away for took in seen.values()) for n, seen in found.items()}
    figures.append(
        Figure(
            "the loop's longest absence from its connections meanwhile, its own CPU time",
            f"{max(away.values()):.1f} ms",
            "<= 50 ms",
            "",
            max(away.values()) <= 50,
            [
                f"{n}: {away[n]:.1f} ms; from a new program's start to its first look: "
                f"upgrade {seen['upgrade'].start:.0f} ms, kill {seen['kill'].start:.0f} ms"
                for n, seen in found.items()
            ],
        )
    )
    return figures


@contextmanager
def _within(pid: int, quota_us: int) -> Iterator[None]:
    """Have a process and its children in a cgroup with so much time of each 100 ms."""
    group = CPU / f"bench-{pid}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))
    except OSError as error:
        raise CannotMeasure(f"no cgroup with a quota: {error}") from error
    try:
        for each in (pid, *descendants(pid)):
            (group / "cgroup.procs").write_text(str(each))
        yield
    finally:
        for line in (group / "cgroup.procs").read_text().split():
            (CPU / "cgroup.procs").write_text(line)
        group.rmdir()


def _busy_poll(scale: Scale, title: str, quota_us: int = 0, hogs: bool = False) -> Figure:
    """Compare one client at a time by default with --busy-poll 0, in many short pairs."""
    with ExitStack() as stack:
        both = [protector(), protector("library", "--busy-poll", "0")]
        for each in both:
            stack.enter_context(each)
            if quota_us:
                stack.enter_context(_within(each.pid, quota_us))
        if hogs:
            stack.enter_context(_hogs())
        for each in both:  # for longer than it takes until a quota is looked at anew
            load(each, 1, 3)
        asks, rests = alternately(
            scale.rounds(25, 3),
            lambda: load(both[0], 1, scale(2, 1)),
            lambda: load(both[1], 1, scale(2, 1)),
        )
    nothing_failed(asks + rests)
    middle, words = ratio(column(asks, "per_second"), column(rests, "per_second"))
    _, p99 = ratio(column(asks, "p99_us"), column(rests, "p99_us"))
    return Figure(
        f"{title}: connections/s one by one, by default / --busy-poll 0",
        words,
        ">= 0.97",
        "",
        middle >= 0.97,
        [
            f"{middle_of(asks, 'per_second'):,.0f}/s against {middle_of(rests, 'per_second'):,.0f}",
            f"p99 {middle_of(asks, 'p99_us'):.0f} us against "
            f"{middle_of(rests, 'p99_us'):.0f}: {p99}",
            f"longest, its median: {middle_of(asks, 'max_us') / 1e3:.1f} ms against "
            f"{middle_of(rests, 'max_us') / 1e3:.1f}",
            f"the protector's CPU: {middle_of(asks, 'parent_us'):.1f} us a connection against "
            f"{middle_of(rests, 'parent_us'):.1f}",
        ],
    )


@contextmanager
def _hogs() -> Iterator[None]:
    """Have each core burnt by another process."""
    cores = sorted(os.sched_getaffinity(0))
    burn = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    hogs = [subprocess.Popen([sys.executable, "-c", burn, str(core)]) for core in cores]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def quota(scale: Scale) -> list[Figure]:
    """What it costs to await the next connection awake where there is no time for it."""
    return [
        _busy_poll(scale, "half a CPU", quota_us=50_000),
        _busy_poll(scale, "a hog on each core", hogs=True),
    ]
