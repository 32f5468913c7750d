"""python -m bench.soak MINUTES: everything at once that may happen to protected services.

Two at a time: one whose workers are handed connections, and seven kinds one after the other
(`--kind`: one alone), whose workers accept by themselves or fork children.  Load, idle
connections, and random reloads, deploys, upgrades, kills, holds, scaling, bad releases, stops,
shortages, by a seed that is printed.  At the end a report for each; exit status 1 if a connection
failed that no kill accounts for, if an idle one changed hands, or if anything leaked.
`--from COMMIT`: each service is started by that commit's code, and the first upgrade is one to this
code; after a minute the service is stopped, and another one is started.
Then, for as long again, the simulation with seeds of its own (tests/simulation).
docs/reliability.md says what is promised and how this tests it.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bench.account import Account, account
from bench.earlier import EarlierCode, NoSuchCommit, extract, resolve
from bench.figures import machine
from bench.service import (
    GOOD,
    SERVICES,
    Gone,
    Kind,
    Service,
    Size,
    become_sub_reaper,
    descendants_now,
    open_files,
    reap,
    size_of,
)
from bench.torment import Torment
from socketprotector.demo.load import Load
from socketprotector.demo.seen import KINDS, Failure, Snapshot

WORKERS = 2
#: Idle connections say a line every PAUSE_S and live for LINES of them: about a minute, which
#: bounds how many old generations there are at a time.
LINES = 5
PAUSE_S = 15.0
OPENED_PER_S = 150.0
#: For each line of a client.  Longer than any back-off that the torment should lead to.
PATIENCE_S = 20.0
#: The guard is killed when this share of the time is over: nothing can replace it in place, so
#: a kill of the protector after it would be an outage.  All other actions go on.
GUARDED_SHARE = 0.85
#: Descriptors that may be there at the end and were not at the start (log, timers).
MORE_DESCRIPTORS = 2
SHOW_EVERY_S = 15.0
REST_S = 60.0
STOP_S = 60.0
#: --drain-timeout of rolling reloads, which need one: no client stays as long.
DRAIN = "2m"
#: How long one lives that was started by an earlier commit's code: the next one is upgraded, too.
FROM_EARLIER_MINUTES = 1.0
INTERRUPTED = 130
ROOT = Path(__file__).parent.parent
#: Where the simulation's seeds begin, for each seed of ours: more than hours take, and none
#: that the tests take.
SEEDS_FOR_EACH = 1_000_000
#: On top of what an idle connection needs: log, tables, listeners.
OTHER_DESCRIPTORS = 200


@dataclass
class Sizes:
    """What guard and protector took at one moment."""

    when: str
    guard: Size | None
    protector: Size | None
    generations: int
    workers: int


@dataclass
class Report:
    """What the run was, and what it has shown beside the connections."""

    seed: int
    minutes: float
    command: str
    sizes: list[Sizes] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # each in words


class Soak:
    """One run."""

    def __init__(
        self, service: Service, seed: int, minutes: float, workers: int, at_once: int, idle: int
    ) -> None:
        """The service has been started."""
        self.service = service
        self.report = Report(seed, minutes, " ".join(map(str, service.command())))
        self.torment = Torment(service, seed, workers)
        self._workers = workers
        self.short = Load(
            service.address,
            concurrency=at_once,
            timeout_s=PATIENCE_S,
            until_eof=True,
            http=service.kind.http,
        )
        self.idle = Load(
            service.address,
            concurrency=idle,
            rate_per_s=OPENED_PER_S,
            timeout_s=PATIENCE_S,
            lines=LINES,
            pause_s=PAUSE_S,
            until_eof=True,
        )
        self._idle_wanted = idle
        self._begun_s = time.monotonic()
        self._shown_s = 0.0
        self._wrongly_named: set[str] = set()

    def run(self) -> tuple[Snapshot, Snapshot]:
        """Do it all; return what the short and the idle connections have seen."""
        self._weigh("at rest, before")
        self.short.start()
        self.idle.start()
        most_s = 3 * self._idle_wanted / OPENED_PER_S + PATIENCE_S
        self.idle.wait_for(lambda now: now.open_now >= self._idle_wanted, most_s)
        self._weigh("loaded, before the first action")
        try:
            self._torment()
        except Gone as error:
            self.expect(False, f"it has ended: {error}")
        self.torment.undo_all()
        self.service.look()
        died = self.service.events["protector-died"]
        killed = sum(kill.victim == "protector" for kill in self.torment.kills)
        self.expect(died <= killed, f"a protector died {died - killed} times by itself")
        short = self.short.stop()
        self.idle.hurry()
        idle = self.idle.join()
        if self.service.protector():
            self._come_to_rest()
            self._weigh("at rest, after")
        return short, idle

    def _torment(self) -> None:
        begun_s = time.monotonic()
        lasts_s = self.report.minutes * 60
        self.torment.run(begun_s + lasts_s * GUARDED_SHARE, self._each_turn)
        self.torment.undo_all()  # or a stopped protector could not notice
        if self.service.from_earlier:
            self._leave_earlier()
        self._weigh("loaded, before the guard is killed")
        self.torment.unguard()
        self.expect(
            self.service.wait(lambda: self.service.events["guard-died"] > 0, REST_S),
            "the protector never noticed that the guard was gone",
        )
        self.expect(self._pid_file_is_protectors(), "the pid file is not the protector's")
        self.torment.run(begun_s + lasts_s, self._each_turn)
        self._weigh("loaded, after the last action")
        deploys = self.torment.deploys
        self.report.wrong += deploys.wrong
        if not self.service.from_earlier:
            minutes, rolling = self.report.minutes, self.service.rolls
            self.report.wrong += deploys.too_few(minutes, rolling=rolling)

    def _each_turn(self) -> None:
        """Find `current` as a power cut now would leave it, and show how far the run is."""
        named = self.service.named
        if named not in GOOD and not self.service.by_hand and named not in self._wrongly_named:
            self._wrongly_named.add(named)
            self.expect(False, f"current names {named}, which was never proved")
        self._show()

    def _leave_earlier(self) -> None:
        """Upgrade, if that was not done yet: without a guard there is no other way to this code."""
        service = self.service
        service.look()
        if not service.left_earlier:
            service.upgrade()
        left = service.wait(lambda: bool(service.left_earlier), REST_S)
        self.expect(left, "it was never upgraded to this code")

    def _pid_file_is_protectors(self) -> bool:
        return self.service.wait(
            lambda: self.service.pid_file.read_text().strip() == str(self.service.protector()),
            REST_S,
        )

    def _come_to_rest(self) -> None:
        """A last reload takes over, with as many workers as at the start, and old ones end."""
        service = self.service
        self.expect(service.wait(self._one_generation, REST_S), "old generations did not end")
        self.torment.restore_workers()
        before = service.events["reloaded"]
        service.send(signal.SIGHUP)
        self.expect(
            service.wait(lambda: service.events["reloaded"] > before, REST_S),
            "the last reload did not succeed",
        )
        self.expect(service.wait(self._one_generation, REST_S), "the last reload left old ones")
        if service.kind.forks:
            alone = service.wait(lambda: not service.strays(), service.kind.drain_s + REST_S)
            self.expect(alone, f"workers that have ended left {service.strays()}")
        serves = service.release_serving
        self.expect(service.named == serves, f"current names {service.named}, not {serves}")
        left = len(service.workers())
        self.expect(left == self._workers, f"{left} workers left")
        # It may notice the end of orphans a moment later than we do.
        service.wait(lambda: not self._leaked(), REST_S / 6)
        self.expect(not self._leaked(), f"descriptors left over: {', '.join(self._leaked())}")

    def _leaked(self) -> list[str]:
        """Return all descriptors of the protector if it has more of them than at the start."""
        first, pid = self.report.sizes[0].protector, self.service.protector()
        names = open_files(pid) if pid else []
        most = first.descriptors + MORE_DESCRIPTORS if first is not None else 0
        return names if len(names) > most else []

    def _one_generation(self) -> bool:
        return set(self.service.workers().values()) == {self.service.serving}

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.report.wrong.append(otherwise)

    def _weigh(self, when: str) -> None:
        service = self.service
        service.wait(lambda: service.protector() != 0, REST_S)
        workers = service.workers()
        guard = protector = None
        try:
            guard = size_of(service.guard) if service.guarded else None
            protector = size_of(service.protector())
        except OSError:
            pass  # between two protectors, or none at all: the next action shows
        self.report.sizes.append(
            Sizes(when, guard, protector, len(set(workers.values())), len(workers))
        )

    def _show(self) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s < SHOW_EVERY_S:
            return
        self._shown_s = now_s
        short, idle = self.short.snapshot(), self.idle.snapshot()
        judged = account(short.failures + idle.failures, self.torment.kills)
        print(
            f"{self.service.kind.name:10} {now_s - self._begun_s:6.0f} s: "
            f"{short.connections:,} connections, "
            f"{idle.open_now:,} idle, {len(judged.held)} held by killed workers, "
            f"{len(judged.being_taken) + len(judged.undelivered)} in hand, "
            f"{len(judged.unaccounted)} unaccounted for; "
            f"{sum(self.torment.counts.values())} actions, "
            f"{len(set(self.service.workers().values()))} generations",
            flush=True,
        )


def _table(sizes: list[Sizes]) -> list[str]:
    def words(size: Size | None) -> str:
        if size is None:
            return "- | -"
        return f"{size.descriptors} | {size.rss_kib / 1024:.1f} / {size.pss_kib / 1024:.1f} MB"

    return [
        "| | guard's descriptors | RSS / PSS | protector's descriptors | RSS / PSS "
        "| generations | workers |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {each.when} | {words(each.guard)} | {words(each.protector)} "
            f"| {each.generations} | {each.workers} |"
            for each in sizes
        ),
    ]


def _kinds(failures: tuple[Failure, ...] | list[Failure]) -> str:
    counted = Counter(failure.kind for failure in failures)
    return ", ".join(f"{counted[kind]} {kind}" for kind in KINDS if counted[kind]) or "none"


def show(soak: Soak, short: Snapshot, idle: Snapshot) -> bool:
    """Print the report; say whether everything is accounted for."""
    report, torment = soak.report, soak.torment
    judged: Account = account(short.failures + idle.failures, torment.kills)
    of_idle = set(map(id, idle.failures))
    wrong = report.wrong
    kills = Counter(kill.victim for kill in torment.kills)
    events = soak.service.events
    kind = soak.service.kind.name
    print(f"\n{kind}: seed {report.seed}, {report.minutes:g} minutes; {machine()}")
    print(f"command: {report.command}")
    print(
        f"\nshort connections: {short.connections:,} answered, p50 "
        f"{short.latency_us(0.5) / 1e3:.1f} ms, p99.9 {short.latency_us(0.999) / 1e3:.1f} ms, "
        f"longest {short.latency_us(1.0) / 1e3:.0f} ms; failed: {_kinds(short.failures)}"
    )
    print(
        f"idle connections: {idle.begun:,} opened, {idle.connections:,} answered to their end by "
        f"the worker that took them; failed: {_kinds(idle.failures)}"
    )
    held_idle = sum(id(failure) in of_idle for failure in judged.held)
    print("\naccount of the failures:")
    print(
        f"- {len(judged.held)} held by a worker that was killed ({kills['worker']} kills), by its "
        f"own record: {len(judged.held) - held_idle} short, {held_idle} idle"
    )
    print(f"- {len(judged.being_taken)} taken at the instant of such a kill, not recorded yet")
    print(
        f"- {len(judged.undelivered)} between accept and send in a protector that was killed "
        f"({kills['protector']} kills)"
    )
    print(f"- {len(judged.unaccounted)} unaccounted for")
    print("\nactions:")
    for what, count in sorted(torment.counts.items()):
        print(f"- {count} x {what}")
    print(
        f"\nwhat came of them: {events['reloaded']} reloaded, {events['reload-failed']} reloads "
        f"failed, {events['probe-failed']} bad answers, {events['dry-run-passed']} dry runs "
        f"passed, {events['dry-run-failed']} failed, {events['deployed']} changes of the release, "
        f"{events['shared']} orders of a share, "
        f"{events['upgrading']} upgraded, "
        f"{events['upgrade-failed']} upgrades failed, "
        f"{events['resumed']} resumed, {events['protector-died']} protectors died, "
        f"{events['broken']} channels broken"
    )
    print("\ndeploys, by what came of them:")
    for what, count in sorted(torment.deploys.counts.items()):
        print(f"- {count} {what}")
    print(f"- {torment.deploys.repeated} ordered again, because another one was in progress")
    print("\n".join(["", *_table(report.sizes)]))
    for text in wrong:
        print(f"\nWRONG: {text}")
    if wrong:
        now_s = time.monotonic()
        print("\n".join(["\nend of the log:", *soak.service.lines_between(0, now_s)[-40:]]))
    for failure in judged.unaccounted[:20]:
        whose = "idle" if id(failure) in of_idle else "short"
        print(
            f"\nUNACCOUNTED FOR: {whose} {failure.kind} port {failure.port} worker {failure.pid} "
            f"begun at {failure.started_s:.3f}, failed at {failure.at_s:.3f}: {failure.detail}"
        )
        near = [
            f"{kill.victim} {kill.pid} at {kill.before_s:.3f}"
            for kill in torment.kills
            if abs(kill.before_s - failure.at_s) < 5
        ]
        print(f"  kills near: {'; '.join(near) or 'none'}")
    for failure in judged.unaccounted[:3]:
        lines = soak.service.lines_between(failure.at_s - 2, failure.at_s + 1)
        print("\n".join(["\nlog around it:", *lines[-60:]]))
    return not judged.unaccounted and not wrong


def _clean_up(service: Service, torment: Torment | None) -> bool:
    """End what is still there; say whether anything had to be killed."""
    if torment is not None:
        torment.undo_all()
    left: list[int] = []
    if not service.end(STOP_S, signal.SIGINT):
        left = descendants_now()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # with its parent
        time.sleep(0.1)
    reap()
    return not left


def torment_both(given: argparse.Namespace) -> int:
    """Torment a service in connection mode beside the other kinds; return the exit status."""
    others = [each.name for each in SERVICES.values() if each.accepts or each.forks]
    if given.commit is not None:  # earlier code may not fork
        others = [name for name in others if not SERVICES[name].forks]
    running: list[subprocess.Popen[bytes]] = []

    def start(kind: str, minutes: float, *, at_once: int, idle: int) -> subprocess.Popen[bytes]:
        words = ("--kind", kind, "--seed", str(given.seed), "--workers", str(given.workers))
        sizes = ("--at-once", str(at_once), "--idle", str(idle), "--simulated", "0")
        kept = ("--keep-log", f"{given.keep_log}-{kind}") if given.keep_log is not None else ()
        earlier = ("--from", given.commit) if given.commit is not None else ()
        options = (*words, *sizes, *kept, *earlier)
        command = (sys.executable, "-m", "bench.soak", str(minutes), *options)
        running.append(subprocess.Popen(command, cwd=ROOT))
        return running[-1]

    try:
        start("connection", given.minutes, at_once=given.at_once, idle=given.idle)
        for kind in others:
            # They share the machine with the other one, and each costs more than its worker.
            at_once, idle = max(1, given.at_once // 4), given.idle // 10
            start(kind, given.minutes / len(others), at_once=at_once, idle=idle).wait()
        return max(each.wait() for each in running)
    except KeyboardInterrupt:
        for each in running:
            if each.poll() is None:
                each.send_signal(signal.SIGINT)
            each.wait()
        raise


def torment_from_earlier(given: argparse.Namespace, kind: Kind) -> int:
    """Torment services that an earlier commit's code has started, one after the other.

    Returns the exit status.
    """
    until_s = time.monotonic() + given.minutes * 60
    ways: Counter[str] = Counter()
    status = number = 0
    with tempfile.TemporaryDirectory(prefix="socketprotector-earlier-") as name:
        extract(given.commit, Path(name))
        while status in (0, 1) and (number == 0 or time.monotonic() < until_s):
            one = argparse.Namespace(**vars(given))
            one.minutes = min(given.minutes, FROM_EARLIER_MINUTES)
            one.seed = given.seed + number
            if given.keep_log is not None:
                one.keep_log = Path(f"{given.keep_log}-{number}")
            worse, way = torment_one(one, kind, Path(name))
            status = max(status, worse)
            ways[way or "nothing: it was not upgraded"] += 1
            number += 1
    told = ", ".join(f"{count} by {way}" for way, count in sorted(ways.items()))
    print(f"\n{kind.name}: started by {given.commit[:12]}: {number}; upgraded to this code: {told}")
    return status


def torment_one(
    given: argparse.Namespace, kind: Kind, extracted: Path | None = None
) -> tuple[int, str]:
    """Torment one service; return the exit status, and by what it has left earlier code.

    extracted: that code, by which it is started.
    """
    become_sub_reaper()

    print(f"{kind.name}: seed {given.seed}", flush=True)
    settle = random.Random(f"{given.seed} {kind.name}").choice(("0", "300ms", "2s"))
    options = ["--start-timeout", "6s", "--kill-timeout", "2s", "--settle", settle]
    folder = Path(tempfile.mkdtemp(prefix="socketprotector-soak-"))
    if given.rolling:
        options += ["--reload-order", "rolling", "--drain-timeout", DRAIN]
    if extracted is None:
        options += ("--health", kind.question, "--health-every", "500ms")
        if settle != "0":
            options += ("--settle-check", f"check:test ! -e {folder}/failing")
    os.environ["XDG_RUNTIME_DIR"] = str(folder)  # the control socket goes there, too
    earlier = EarlierCode(folder, extracted) if extracted is not None else None
    service = Service(folder, kind, options, given.workers, earlier)
    soak: Soak | None = None
    clean = False
    try:
        service.start()
        # One HTTP request a connection: no client is idle there.
        idle = 0 if kind.http else given.idle
        soak = Soak(service, given.seed, given.minutes, given.workers, given.at_once, idle)
        seen = soak.run()
        clean = service.end(STOP_S)
        soak.expect(clean, f"it did not end within {STOP_S:g} s of TERM")
        soak.expect(not service.pid_file.exists(), "the pid file was left behind")
        return 0 if show(soak, *seen) else 1, service.left_earlier
    except KeyboardInterrupt:
        print("interrupted; everything that was started is being stopped")
        return INTERRUPTED, service.left_earlier
    except subprocess.CalledProcessError as error:
        return int(error.returncode), ""  # the protector has said why
    finally:
        if not clean:
            _clean_up(service, soak.torment if soak else None)
        if given.keep_log is not None and service.log.exists():
            shutil.copyfile(service.log, given.keep_log)
        shutil.rmtree(folder, ignore_errors=True)


def simulate(seed: int, minutes: float) -> int:
    """Run the simulation for so long, with fresh seeds; return its exit status."""
    first = SEEDS_FOR_EACH * (1 + seed)
    words = ("-m", "tests.simulation", "--first", str(first), "--minutes", str(minutes))
    print(f"\nsimulation, {minutes:g} minutes:", flush=True)
    return subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode


def main() -> int:
    """Run the soak and the simulation; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--at-once", type=int, default=64, help="short connections")
    parser.add_argument("--idle", type=int, default=2000, help="long-lived connections")
    parser.add_argument("--kind", choices=SERVICES, help="this one alone, for all of the time")
    parser.add_argument("--workers", type=int, default=WORKERS, help="of each service")
    parser.add_argument("--rolling", action="store_true", help="needs --kind connection")
    parser.add_argument("--keep-log", type=Path, help="copy the service's log there at the end")
    parser.add_argument("--simulated", type=float, help="minutes of the simulation; 0: none")
    parser.add_argument(
        "--from", dest="commit", metavar="COMMIT", help="start by its code, upgrade to this one"
    )
    given = parser.parse_args()
    try:
        if given.rolling and (given.kind != "connection" or given.commit is not None):
            parser.error("--rolling needs --kind connection, and no --from")
        given.commit = resolve(given.commit) if given.commit is not None else None
    except NoSuchCommit as error:
        parser.error(str(error))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # they clean up as Ctrl-C does
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Workers hold the idle ones, all of them perhaps: theirs is the same limit.
    if most < given.idle + given.at_once + OTHER_DESCRIPTORS:
        parser.error(f"{given.idle} idle connections need more than {most} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    minutes = given.minutes if given.simulated is None else given.simulated
    try:
        kind = SERVICES.get(given.kind)
        if kind is None:
            status = torment_both(given)
        elif given.commit is not None:
            status = torment_from_earlier(given, kind)
        else:
            status, _ = torment_one(given, kind)
        if status in (0, 1) and minutes > 0:
            status = max(status, simulate(given.seed, minutes))
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
