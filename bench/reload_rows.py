"""One function for each line of the table that is about reloads and generations."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from bench.figures import Figure, Scale, alternately, median, ratio
from bench.processes import (
    HANDED,
    CannotMeasure,
    Started,
    ask,
    cpu_ns,
    protector,
    resident_kib,
    stamps,
    switches,
    worker_command,
)
from bench.rows import Seen, column, load, middle_of, nothing_failed

GENERATIONS = 50
KEPT = 5000
NEW_ONE_LIMIT_S = 20.0


class EverySecond:
    """Calls `act` each second, in a thread, while the `with` block runs."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.count = 0

    def _run(self) -> None:
        while not self._over.wait(1.0):
            self._act()
            self.count += 1

    def __enter__(self) -> EverySecond:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _start_and_stop_a_worker() -> None:
    """What the start of a new worker costs the machine, without a reload."""
    command = [*worker_command("channel")]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()  # end of file: it starts, is told to drain, and ends
    env = {**os.environ, "SOCKETPROTECTOR_CHANNEL": str(theirs.fileno())}
    env.pop("NOTIFY_SOCKET", None)
    with theirs:
        subprocess.run(command, env=env, pass_fds=[theirs.fileno()], check=True)


def reloads(scale: Scale) -> list[Figure]:
    """Failures and the tail of the latency under a reload every second."""
    return _reloads(scale, ("library",), "", at_least_a_second=0.8)


def handed_reloads(scale: Scale) -> list[Figure]:
    """The same where the workers accept: each reload waits until the one before is over."""
    return _reloads(scale, HANDED, "--handoff listener: ", at_least_a_second=0.3)


def _reloads(
    scale: Scale, words: Sequence[str], prefix: str, at_least_a_second: float
) -> list[Figure]:
    seconds = scale(20, 3)
    made: list[int] = []

    with protector(*words) as started:

        def reloading() -> Seen:
            first = stamps(started.address)["generation"]
            with EverySecond(lambda: os.kill(started.pid, signal.SIGHUP)):
                seen = load(started, 64, seconds, "--plain")
            time.sleep(1)  # the last one may still be starting
            made.append(stamps(started.address)["generation"] - first)
            return seen

        def only_starting() -> Seen:
            with EverySecond(_start_and_stop_a_worker):
                return load(started, 64, seconds, "--plain")

        moving, quiet, starting = alternately(
            scale.rounds(3), reloading, lambda: load(started, 64, seconds, "--plain"), only_starting
        )
    failed = int(sum(column(moving, "failed")))
    middle, compared = ratio(column(moving, "p999_us"), column(quiet, "p999_us"))
    of_starting = ratio(column(starting, "p999_us"), column(quiet, "p999_us"))[1]
    return [
        Figure(
            f"{prefix}reload every second for {seconds * len(moving):.0f} s at C=64: failed",
            f"{failed} of {sum(column(moving, 'connections')):,.0f}",
            "0",
            "0",
            failed == 0 and sum(made) >= seconds * len(moving) * at_least_a_second,
            [
                f"{sum(made)} reloads made; "
                f"{middle_of(moving, 'per_second'):,.0f} connections/s against "
                f"{middle_of(quiet, 'per_second'):,.0f} without reloads",
                *(f"failures: {run}" for run in moving if run["failed"]),
            ],
        ),
        Figure(
            f"{prefix}its p99.9 / p99.9 without reloads",
            compared,
            "<= 2",
            "",
            middle <= 2,
            [
                f"{middle_of(moving, 'p999_us') / 1e3:.1f} ms against "
                f"{middle_of(quiet, 'p999_us') / 1e3:.1f}; longest "
                f"{max(column(moving, 'max_us')) / 1e3:.1f} ms against "
                f"{max(column(quiet, 'max_us')) / 1e3:.1f}",
                "the same with a worker's interpreter started each second but no reload: "
                f"{of_starting}",
            ],
        ),
    ]


def first_answer(started: Started) -> tuple[int, int]:
    """Reload once; return when HUP was sent, and when the new generation answered."""
    old = ask(started.address)[0]
    hup_ns = time.monotonic_ns()
    os.kill(started.pid, signal.SIGHUP)
    while ask(started.address)[0] == old:
        # A short sleep: a client that never sleeps takes from the new worker the core it starts on.
        time.sleep(0.0002)
        if time.monotonic_ns() - hup_ns > NEW_ONE_LIMIT_S * 1e9:
            raise CannotMeasure(f"no new generation within {NEW_ONE_LIMIT_S} s of HUP")
    return hup_ns, time.monotonic_ns()


def one_reload(started: Started) -> dict[str, float]:
    """Reload once; return milliseconds: whole, the worker's own start, before it, after it."""
    hup_ns, served_ns = first_answer(started)
    told = stamps(started.address)
    return {
        "whole": (served_ns - hup_ns) / 1e6,
        "own": (told["ready_ns"] - told["execed_ns"]) / 1e6,
        "before": (told["execed_ns"] - hup_ns) / 1e6,
        "after": (served_ns - told["ready_ns"]) / 1e6,
        "first": (told["first_ns"] - told["ready_ns"]) / 1e6,
    }


def switch(scale: Scale) -> list[Figure]:
    """HUP to the first connection served by the new generation, less the worker's own start."""
    with protector() as started:
        runs = []
        for _ in range(scale.rounds(30, 5)):
            runs.append(one_reload(started))
            time.sleep(0.2)  # the old worker's end is not part of the next reload
    added = [run["whole"] - run["own"] for run in runs]
    middle = {name: median([run[name] for run in runs]) for name in runs[0]}
    return [
        Figure(
            "HUP to first connection served by the new generation, less the worker's own start",
            f"{median(added):.2f} ms ({min(added):.2f} to {max(added):.2f})",
            "<= 5 ms",
            "2 ms",
            median(added) <= 5,
            [
                f"{len(runs)} reloads of an idle protector; whole {middle['whole']:.1f} ms, of "
                f"which the worker's start (exec to READY sent) {middle['own']:.1f}",
                f"HUP to exec {middle['before']:.2f} ms; READY sent to first taken "
                f"{middle['first']:.2f}, to the reply at a client that asks every 0.3 ms "
                f"{middle['after']:.2f}",
            ],
        )
    ]


def pile_up(started: Started, generations: int, connections: int) -> list[socket.socket]:
    """Leave `connections` open, spread over `generations` that all drain; return them."""
    host, port = started.address.rsplit(":", 1)
    held: list[socket.socket] = []
    for number in range(generations):
        while len(held) < connections * (number + 1) // generations:
            sock = socket.create_connection((host, int(port)), 10)
            sock.sendall(b"hold\n")
            if not sock.recv(512).endswith(b"hold\n"):
                raise CannotMeasure("a connection to be held was not answered")
            held.append(sock)
        one_reload(started)
    return held


def still_there(held: list[socket.socket]) -> tuple[int, int]:
    """Ask each held connection something; return how many answered, and by how many workers."""
    pids = set()
    answered = 0
    for sock in held:
        try:
            sock.sendall(b"still\n")
            reply = sock.recv(512)
        except OSError:
            continue  # counted by not being counted
        if reply.endswith(b"still\n"):
            answered += 1
            pids.add(reply.split()[0])
    return answered, len(pids)


def draining(scale: Scale) -> list[Figure]:
    """The same figures beside a protector that many old generations still hang on."""
    generations, connections = scale.rounds(GENERATIONS, 5), scale.rounds(KEPT, 100)
    with protector() as fresh, protector() as laden:
        held = pile_up(laden, generations, connections)
        try:
            return _compared(scale, fresh, laden, held, generations)
        finally:
            for sock in held:
                sock.close()


def _compared(
    scale: Scale, fresh: Started, laden: Started, held: list[socket.socket], generations: int
) -> list[Figure]:
    many, many_fresh, one, one_fresh = alternately(
        scale.rounds(7),
        lambda: load(laden, 64, scale(3, 0.5), "--plain"),
        lambda: load(fresh, 64, scale(3, 0.5), "--plain"),
        lambda: load(laden, 1, scale(1, 0.5)),
        lambda: load(fresh, 1, scale(1, 0.5)),
    )
    nothing_failed(many + many_fresh + one + one_fresh)
    time.sleep(scale(20, 1))
    before, cpu_before = switches(laden.pid), cpu_ns(laden.pid)
    time.sleep(scale(30, 2))
    woken, spent = sum(switches(laden.pid)) - sum(before), cpu_ns(laden.pid) - cpu_before
    switched = [one_reload(laden) for _ in range(scale.rounds(10, 3))]
    added = median([run["whole"] - run["own"] for run in switched])
    answered, by = still_there(held)
    spent_ratio, spent_words = ratio(column(many, "parent_us"), column(many_fresh, "parent_us"))
    rate_ratio, rate_words = ratio(column(many, "per_second"), column(many_fresh, "per_second"))
    p50_ratio, p50_words = ratio(column(one, "p50_us"), column(one_fresh, "p50_us"))
    where = f"with {generations} draining generations and {len(held):,} connections open in them"
    growth_kib = resident_kib(laden.pid) - resident_kib(fresh.pid)
    return [
        Figure(
            f"CPU per forwarded connection {where} / without",
            spent_words,
            "unchanged within noise",
            "",
            spent_ratio <= 1.1,
            [
                f"{middle_of(many, 'parent_us'):.1f} us against "
                f"{middle_of(many_fresh, 'parent_us'):.1f}",
                f"connections/s {rate_words}, p50 of one at a time {p50_words}",
                f"idle: {woken} wake-ups, {spent / 1e3:.0f} us of CPU in {scale(30, 2):.0f} s; "
                f"resident {resident_kib(laden.pid) / 1024:.1f} MB, "
                f"{growth_kib / generations:.0f} KiB a generation",
                f"HUP to first served less the worker's start: {added:.2f} ms",
                f"afterwards {answered:,} of {len(held):,} held connections answered, "
                f"by {by} workers",
                f"noise: the ratios of rate and p50 should be as near to 1: "
                f"{rate_ratio:.2f}, {p50_ratio:.2f}",
            ],
        ),
        Figure(
            f"held connections that survived all reloads {where}",
            f"{answered:,} of {len(held):,}",
            "all",
            "",
            answered == len(held) and woken == 0,
        ),
    ]
