"""What is checked inside of the machine.  Each name is a promise; each has a unit of its own.

A check says what it counted.  It waits for facts, never for a time, and judges none.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from .guest import (
    ECHO,
    PROGRAMS,
    PYTHON,
    TESTS,
    Held,
    Load,
    NotRun,
    Service,
    ask_http,
    ask_line,
    eventually,
    is_refused,
    lives,
    load_on,
    parent_of,
    run,
    systemctl,
    systemd_version,
    waits_awake,
)
from .programs import takes_a_number
from .promises import Say, promise

ASYNCIO = f"{PYTHON} {PROGRAMS}/asyncio_server.py"
#: bench/many.c: 600 of them fit into the machine.
SMALL = "/opt/many"
PREFORK = f"{PYTHON} {PROGRAMS}/prefork.py 3"
LISTENER = "--handoff listener --ready notify"
SERVERS = "/opt/tests/servers/programs"


def none_failed(load: Load, say: Say, what: str, allowed: int = 0) -> None:
    """End the load, say how it went; at most so many may have met a closed connection."""
    load.end()
    say(f"{what}: {load.text()}")
    closed = load.failed["ConnectionResetError"] + load.failed["empty answer"]
    assert load.failures == closed, f"not only closed connections: {load.text()}"
    assert closed <= allowed, f"more than {allowed} failed: {load.text()}"


def stopped_in_order(service: Service) -> None:
    """Stop it: nothing of it is left, and systemd has nothing to complain of."""
    assert service.processes()
    systemctl("stop", service.unit)
    ended_in_order(service)


def ended_in_order(service: Service) -> None:
    """service: one whose processes were asked for while it ran, so that its group is known."""
    assert service.show("Result") == "success", service.show("Result")
    assert service.show("ActiveState") == "inactive"
    assert service.processes() == []
    assert service.stored == 0
    eventually(lambda: is_refused(service.port), "a port without a listener")


# -- the shipped template ------------------------------------------------------


@promise("start returns when the first generation serves, and stop leaves nothing")
def _(say: Say) -> None:
    with Service("start", "/usr/local/bin/SampleClient {port} 2") as service:
        service.start()

        worker = ask_line(service.port)
        assert service.show("ActiveState") == "active"
        assert service.status_text == "generation 1 is serving"
        assert service.pid == int(Path("/run/socketprotector/start/pid").read_text())
        [relay] = set(service.processes()) - {service.pid, worker}
        assert b"log_relay" in Path(f"/proc/{relay}/cmdline").read_bytes()
        assert resource.prlimit(worker, resource.RLIMIT_NOFILE) == (1024, 524288)
        assert "event=ready" in service.journal()

        stopped_in_order(service)
        assert not Path("/run/socketprotector/start").exists()


@promise("a start that fails makes systemctl start fail, and says why")
def _(say: Say) -> None:
    with Service("fails", "/bin/false", "--start-tries 1", drop_in=["Restart=no"]) as service:
        done = run("systemctl", "start", service.unit)

        assert done.returncode != 0
        assert service.show("ActiveState") == "failed"
        assert "exited with status 1" in service.status_text, service.status_text


@promise("wrong options are not tried again")
def _(say: Say) -> None:
    with Service("wrong", options="--no-such-option 1") as service:
        assert run("systemctl", "start", service.unit).returncode != 0
        assert service.show("ActiveState") == "failed"
        assert service.show("ExecMainStatus") == "2"
        assert service.show("NRestarts") == "0"


@promise("five reloads under load lose no client, and the connected stay with their worker")
def _(say: Say) -> None:
    with Service("reload") as service, load_on(service.start()) as load:
        with closing(Held(service.port)) as held:
            first = held.ask()
            for generation in range(2, 7):
                service.reload()
                assert service.status_text == f"generation {generation} is serving"
                load.more()
            assert held.ask() == first
        eventually(lambda: not lives(first), "the end of the first generation")
        none_failed(load, say, "5 reloads")
        assert len(load.pids) == 6


@promise("a broken release makes systemctl reload fail, says why, and loses no client")
def _(say: Say) -> None:
    release = Path("/opt/release")
    good = f"#!/bin/sh\nexec {ECHO}\n"
    release.write_text(good)
    release.chmod(0o755)
    with Service("broken", str(release)) as service, load_on(service.start()) as load:
        before = service.workers()
        release.write_text("#!/bin/sh\necho it is broken >&2\nexit 7\n")
        done = run("systemctl", "reload", service.unit)
        assert done.returncode != 0, "systemctl reload said that it worked"
        assert "exited with status 7" in service.status_text, service.status_text
        assert service.show("ActiveState") == "active"
        assert service.workers() == before
        said = service.journal()
        assert "event=reload-failed" in said, said
        assert "it is broken" in said, said
        load.more()

        release.write_text(good)
        service.reload()
        assert service.workers() != before
        load.more()
        none_failed(load, say, "a broken release and back")
    release.unlink()


@promise("a killed protector is back with the same workers, and loses one connection at most")
def _(say: Say) -> None:
    with Service("killed", options="--workers 2") as service, load_on(service.start()) as load:
        with closing(Held(service.port)) as held:
            first, workers = held.ask(), set(service.workers())
            for kills in range(1, 4):
                service.kill()
                assert service.show("NRestarts") == str(kills)
                assert set(service.workers()) == workers
                load.more()
            service.reload()
            load.more()
            assert held.ask() == first
        assert not workers & set(service.workers())
        none_failed(load, say, "3 SIGKILLs of the protector and a reload", allowed=3)
        stopped_in_order(service)


@promise("a protector that is killed while a reload is under way finishes it")
def _(say: Say) -> None:
    slow = f"/bin/sh -c 'sleep 3; exec {ECHO}'"
    release = Path("/opt/slow-release")
    release.write_text(f"#!/bin/sh\nexec {ECHO}\n")
    release.chmod(0o755)
    with Service("midway", str(release)) as service, load_on(service.start()) as load:
        before = service.pid
        release.write_text(f"#!/bin/sh\nexec {slow}\n")
        service.signal(signal.SIGHUP)
        eventually(lambda: len(service.status()["generations"]) == 2, "a second generation")
        os.kill(before, signal.SIGKILL)
        service.revived(before)
        eventually(lambda: service.generation() == 2, "the generation that was being started")
        load.more()
        none_failed(load, say, "SIGKILL amid a reload", allowed=1)
    release.unlink()


@promise("a killed worker is replaced; only its own connections are lost")
def _(say: Say) -> None:
    with Service("worker", options="--workers 2") as service, load_on(service.start()) as load:
        with closing(Held(service.port)) as one, closing(Held(service.port)) as other:
            killed, lost = one.ask(), 0
            for held in (one, other):  # both may be with the same one
                held.ask()
            kept = other.ask() != killed
            os.kill(killed, signal.SIGKILL)
            eventually(
                lambda: len(service.workers()) == 2 and killed not in service.workers(),
                "another worker in its place",
            )
            load.more()
            if kept:
                assert other.ask() != killed
            try:
                one.ask()
            except (OSError, ValueError):
                lost = 1
            assert lost == 1
        assert service.show("NRestarts") == "0"
        # Two clients: that many at most were with it at that instant.
        none_failed(load, say, "a worker killed", allowed=2)


@promise("USR2 replaces the protector's program under the same pid, and loses no client")
def _(say: Say) -> None:
    with Service("upgrade") as service, load_on(service.start()) as load:
        with closing(Held(service.port)) as held:
            first, pid, workers = held.ask(), service.pid, service.workers()
            for _ in range(3):
                service.upgrade()
                load.more()
            assert (service.pid, service.workers(), held.ask()) == (pid, workers, first)
        service.reload()
        load.more()
        none_failed(load, say, "3 upgrades and a reload")
        assert service.show("NRestarts") == "0"
        service.kill()
        assert ask_line(service.port) in service.workers()
        stopped_in_order(service)


@promise("stop under load serves who has connected")
def _(say: Say) -> None:
    with Service("stop", options="--workers 2") as service, load_on(service.start()) as load:
        with closing(Held(service.port)) as held:
            held.ask()
            assert service.processes()
            stopping = subprocess.Popen(["systemctl", "stop", service.unit])
            eventually(lambda: service.status_text == "stopping", "that it stops")
            held.ask()  # is served on
        assert stopping.wait(120) == 0
        load.end()
        say(f"stop: {load.text()}")
        # Who came after TERM has waited, for it could be a restart.
        told = load.failed["ConnectionRefusedError"] + load.failed["ConnectionResetError"]
        assert load.failures == told, load.text()
        ended_in_order(service)


@promise("a stop with a lame duck serves those who come meanwhile; systemd waits for it")
def _(say: Say) -> None:
    with (
        Service(
            "lame",
            options="--lame-duck 60s --stop-timeout 5s",
            drop_in=["TimeoutStopSec=20s"],  # which EXTEND_TIMEOUT_USEC= makes longer
        ) as service,
        load_on(service.start()) as load,
    ):
        assert service.processes()
        began_s = time.monotonic()
        stopping = subprocess.Popen(["systemctl", "stop", service.unit])
        eventually(lambda: "lame duck" in service.status_text, "that it is one")
        load.more(20)
        assert stopping.poll() is None
        none_failed(load, say, "a lame duck")
        assert stopping.wait(300) == 0
        say(f"systemctl stop took {time.monotonic() - began_s:.0f} s")
        ended_in_order(service)


@promise("where it is stopped again, a lame duck ends")
def _(say: Say) -> None:
    with Service("again", options="--lame-duck 1h") as service:
        service.start()
        assert service.processes()
        stopping = subprocess.Popen(["systemctl", "stop", service.unit])
        eventually(lambda: "lame duck" in service.status_text, "that it is one")
        service.signal(signal.SIGTERM)
        assert stopping.wait(300) == 0
        ended_in_order(service)


def _restarts(name: str, command: str, options: str, say: Say) -> None:
    with (
        Service(name, command, options) as service,
        load_on(service.start(), clients=4) as load,
    ):
        for _ in range(20):
            before = service.pid
            systemctl("restart", service.unit)
            assert service.pid != before
            assert service.generation() == 1
            load.more(4)
        assert service.status()["restarts"] == 0
        none_failed(load, say, "20 restarts")
        stopped_in_order(service)


@promise("twenty restarts under load refuse and reset no client, and a stop frees the port")
def _(say: Say) -> None:
    _restarts("restarts", ECHO, "--workers 2", say)


@promise("twenty restarts under load refuse and reset no client where the workers accept")
def _(say: Say) -> None:
    _restarts("accepts", f"{PYTHON} {TESTS}/workers/accepts.py", LISTENER, say)


@promise(
    "a restart with other addresses and another user keeps those that are wanted, and no others"
)
def _(say: Say) -> None:
    one, other = 4301, 4302
    path = "/run/socketprotector/moves/socket"
    listen = f"127.0.0.1:{one} unix:{path}?mode=600 127.0.0.1:{{port}}"
    with Service("moves", listen=listen) as service, load_on(service.start()) as load:
        file = Path(path).stat()
        assert ask_line(one)
        listens = listen.replace(f":{one} ", f":{other} ").replace("mode=600", "mode=660")
        service.settle(listen=listens.format(port=service.port).split(), user="nobody")
        systemctl("restart", service.unit)
        assert is_refused(one)
        assert ask_line(other) in service.workers()
        assert Path(f"/proc/{service.pid}").stat().st_uid != 0
        assert Path(path).stat().st_ino == file.st_ino
        assert Path(path).stat().st_mode & 0o777 == 0o660
        load.more()
        service.kill()
        assert ask_line(other) in service.workers()
        load.more()
        none_failed(load, say, "a restart with another address, and a SIGKILL", allowed=1)
        stopped_in_order(service)
        assert is_refused(other)


@promise("a restart that fails frees the port, and the next start has it")
def _(say: Say) -> None:
    with Service("wrongly") as service:
        service.start()
        service.settle(no_such_key=1)
        assert run("systemctl", "restart", service.unit).returncode != 0
        assert service.show("ActiveState") == "failed"
        assert is_refused(service.port)
        service.forget("no-such-key")
        service.start()
        assert ask_line(service.port) in service.workers()
        stopped_in_order(service)


@promise("restart starts afresh")
def _(say: Say) -> None:
    with Service("restart") as service, load_on(service.start()) as load:
        before = service.pid
        service.reload()
        systemctl("restart", service.unit)
        assert service.pid != before
        assert service.generation() == 1
        assert service.status()["restarts"] == 0
        load.more()
        none_failed(load, say, "restart")


@promise("systemctl kill -s HUP to the main process is a reload, -s TERM is a stop in order")
def _(say: Say) -> None:
    with Service("signals") as service, load_on(service.start()) as load:
        assert service.processes()
        service.signal(signal.SIGHUP)
        eventually(lambda: service.status_text == "generation 2 is serving", "the reload")
        load.more()
        none_failed(load, say, "HUP by systemctl kill")
        service.signal(signal.SIGTERM)
        eventually(lambda: service.show("ActiveState") == "inactive", "its end")
        assert service.show("Result") == "success"
        assert service.show("NRestarts") == "0"
        ended_in_order(service)


@promise("systemctl kill without more is a stop in order, too")
def _(say: Say) -> None:
    with Service("all", options="--workers 2") as service:
        service.start()
        assert ask_line(service.port) in service.processes()
        systemctl("kill", service.unit)  # TERM to protector and workers at once
        eventually(lambda: service.show("ActiveState") in ("inactive", "failed"), "its end")
        assert service.show("Result") == "success", service.journal()
        ended_in_order(service)


@promise("after kill -s KILL of all and a stop, a start is afresh")
def _(say: Say) -> None:
    with Service("afresh", options="--workers 2") as service:
        service.start()
        service.reload()
        before = service.pid
        systemctl("kill", "-s", "KILL", service.unit)
        service.revived(before)
        eventually(lambda: ask_line(service.port) in service.workers(), "workers, again")
        systemctl("stop", service.unit)
        service.start()
        assert service.generation() == 1
        assert service.status()["restarts"] == 0


@promise("a protector that hangs is killed by the watchdog and comes back, and loses no client")
def _(say: Say) -> None:
    with (
        Service("hangs", drop_in=["WatchdogSec=10"]) as service,
        load_on(service.start()) as load,
        closing(Held(service.port)) as held,
    ):
        first, before = held.ask(), service.pid
        os.kill(before, signal.SIGSTOP)
        service.revived(before)
        assert "watchdog" in service.journal().lower()
        load.more()
        assert held.ask() == first
        none_failed(load, say, "a hanging protector", allowed=1)


@promise("the watchdog does not touch one that is well")
def _(say: Say) -> None:
    with Service("well", drop_in=["WatchdogSec=6"]) as service, load_on(service.start()) as load:
        before = service.pid
        stamp = int(service.show("WatchdogTimestampMonotonic"))
        eventually(
            lambda: int(service.show("WatchdogTimestampMonotonic")) > stamp + 12_000_000,
            "what it says in twice the watchdog's time",
        )
        assert service.pid == before
        none_failed(load, say, "12 s under a watchdog of 6 s")


def _has(service: Service, workers: int) -> bool:
    return len(service.workers()) == workers and service.stored >= 2 * workers


@promise("the store holds as many descriptors as the unit's limit counts on, and a stop empties it")
def _(say: Say) -> None:
    with Service("store", options="--workers 3", listen="127.0.0.1:{port}") as service:
        service.start()
        for workers in (3, 5):
            service.ctl("scale", str(workers))
            eventually(partial(_has, service, workers), f"{workers} workers, and them in the store")
            most = 12 + 4 * workers  # 4 for each worker without --ready: docs/systemd.md
            say(f"{workers} workers: {service.stored} descriptors in the store, {most} promised")
            assert service.stored <= most
        before = service.stored
        service.reload()
        eventually(lambda: service.stored <= before, "an old generation's descriptors dropped")
        stopped_in_order(service)


@promise("a reload of 600 workers fits into the unit's store, and goes on after a SIGKILL amid it")
def _(say: Say) -> None:
    release, gate = Path("/opt/small-release"), Path("/opt/gate")
    release.write_text(f"#!/bin/sh\nexec {SMALL}\n")
    release.chmod(0o755)
    gate.unlink(missing_ok=True)
    os.mkfifo(gate, 0o666)
    options = "--workers 600 --start-timeout 20m"
    with (
        Service("many", str(release), options, drop_in=["TasksMax=infinity"]) as service,
        load_on(service.start()) as load,
    ):
        first = set(service.workers())
        release.write_text(f"#!/bin/sh\nread -r _ <{gate}\nexec {SMALL}\n")
        service.signal(signal.SIGHUP)
        eventually(lambda: service.stored > 4800, "both generations in the store", 1200)
        say(f"{service.stored} descriptors in the store amid the reload")
        service.kill()
        assert set(service.workers()) == first
        load.more()
        gate.open("w").close()  # all that wait to read, read on
        eventually(lambda: service.status_text == "generation 2 is serving", "the reload", 1200)
        second = set(service.workers())
        assert len(second) == 600
        assert not first & second
        eventually(lambda: service.stored < 2500, "the first generation out of the store", 1200)
        service.kill()
        assert set(service.workers()) == second
        load.more()
        assert "store-full" not in service.journal(lines=10_000)
        none_failed(load, say, "600 workers: a reload and two SIGKILLs", allowed=2)
        stopped_in_order(service)
    release.unlink()
    gate.unlink()


@promise("a store that is full is said; what has no room does not outlive a kill, the service does")
def _(say: Say) -> None:
    # Before 254 systemd does not say how much room there is.
    told = [] if systemd_version() >= 254 else ["Environment=FDSTORE=15"]
    drop_in = ["FileDescriptorStoreMax=15", *told]
    with Service("full", options="--workers 4", drop_in=drop_in) as service:
        service.start()
        first = set(service.workers())
        assert "event=store-full" in service.journal()
        assert service.stored <= 15
        service.kill()
        ask_line(service.port)
        eventually(lambda: len(service.workers()) == 4, "as many workers as before")
        say(f"{len(first & set(service.workers()))} of 4 workers have outlived the protector")
        service.reload()
        ask_line(service.port)
        eventually(lambda: not any(map(lives, first)), "the end of the first workers")
        stopped_in_order(service)


@promise("no more is stored than systemd can pass on below the soft limit of descriptors")
def _(say: Say) -> None:
    # One more than fits, and each start ends with 202/FDS.
    drop_in = ["LimitNOFILE=100:524288"]
    with Service("soft", options="--workers 31", command=SMALL, drop_in=drop_in) as service:
        service.start()
        before = service.stored
        say(f"31 workers: {before} descriptors in the store")
        service.kill()
        ask_line(service.port)
        assert service.show("NRestarts") == "1"
        assert before <= 100 - 3
        stopped_in_order(service)


@promise("a re-execution of systemd keeps the store")
def _(say: Say) -> None:
    with Service("reexec") as service, load_on(service.start()) as load:
        workers, stored = service.workers(), service.stored
        systemctl("daemon-reexec")
        eventually(lambda: service.stored == stored, "the store after the re-execution")
        service.kill()
        assert service.workers() == workers
        service.reload()
        load.more()
        none_failed(load, say, "daemon-reexec, SIGKILL, reload", allowed=1)


@promise("a worker that is killed for want of memory is replaced, and the unit goes on")
def _(say: Say) -> None:
    command = f"{PYTHON} {PROGRAMS}/eats.py"
    with Service("memory", command, drop_in=["MemoryMax=150M", "MemorySwapMax=0"]) as service:
        service.start()
        protector = service.pid
        worker = ask_line(service.port)
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(b"eat\n")
            try:
                assert client.recv(1) == b""
            except ConnectionResetError:
                pass
        eventually(lambda: ask_line(service.port) != worker, "another worker")
        assert service.pid == protector
        assert service.show("NRestarts") == "0"
        assert service.show("ActiveState") == "active"
        assert "oom" in run("journalctl", "-b", "-k", "-o", "cat").stdout.lower()


@promise("100 workers are killed because memory ran out, and each is reported as that")
def _(say: Say) -> None:
    by_limit = "was killed by SIGKILL: out of memory (the service's limit of 150M)"
    _each_end_is_reported_as(by_limit, True, say)


@promise("100 workers are killed by other processes, and memory is blamed for none")
def _(say: Say) -> None:
    _each_end_is_reported_as("was killed by SIGKILL", False, say)


def _each_end_is_reported_as(how: str, of_memory: bool, say: Say) -> None:
    command = f"{PYTHON} {PROGRAMS}/eats.py"
    reported = 0
    with Service("named", command, drop_in=["MemoryMax=150M", "MemorySwapMax=0"]) as service:
        service.start()
        for _ in range(50):
            for _ in range(2):
                [generation] = service.status()["generations"]
                [worker] = generation["workers"]
                _end_worker(service, worker["pid"], of_memory=of_memory)
                line = _exit_line(service, generation["number"], worker["number"])
                reported += f'how="{how}"' in line
            service.reload()  # so that no worker is a slot's third quick death
            eventually(lambda: len(service.status()["generations"]) == 1, "one generation")
        say(f"{reported} of 100")
        assert reported == 100
        stopped_in_order(service)


def _end_worker(service: Service, worker: int, *, of_memory: bool) -> None:
    """Let the kernel or this process kill the worker, and wait for another in its place."""
    if of_memory:
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(b"eat\n")
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""
    else:
        os.kill(worker, signal.SIGKILL)
    eventually(lambda: service.workers() not in ([], [worker]), "another worker")
    assert ask_line(service.port) != worker


def _exit_line(service: Service, generation: int, worker: int) -> str:
    """Return the log line about the end of a worker."""
    wanted = f"event=exited generation={generation} worker={worker} how="
    found: list[str] = []

    def is_logged() -> bool:
        found[:] = [line for line in service.journal().splitlines() if wanted in line]
        return bool(found)

    eventually(is_logged, f"the end of worker {worker} in the journal")
    return found[-1]


# -- releases ------------------------------------------------------------------


@promise("a unit with releases: a deploy moves current, a bad one does not, a restart starts it")
def _(say: Say) -> None:
    site = Path("/srv/vm-releases")
    for name in ("1", "2", "bad"):
        (site / "releases" / name).mkdir(parents=True)
        daemon = site / "releases" / name / "daemon"
        daemon.write_text("#!/bin/sh\nexit 7\n" if name == "bad" else f"#!/bin/sh\nexec {ECHO}\n")
        daemon.chmod(0o755)
    (site / "live").mkdir()
    current = site / "live" / "current"
    current.symlink_to(site / "releases" / "1")
    with Service("releases") as service:
        service.settle(
            command=["{release}/daemon"], releases=str(site / "releases"), current=str(current)
        )
        with load_on(service.start()) as load:
            for words, status, named in (
                (("deploy", "2"), 0, "2"),
                (("deploy", "bad"), 3, "2"),
                (("rollback",), 0, "1"),
                (("deploy", "2", "--expect", "1"), 0, "2"),
            ):
                done = service.ctl(*words)
                assert done.returncode == status, (words, done.stdout, done.stderr)
                assert os.readlink(current) == str(site / "releases" / named), words
                load.more()
            before = service.workers()
            service.kill()
            assert service.workers() == before
            service.upgrade()
            service.reload()
            load.more()
            none_failed(load, say, "3 deploys, a bad one, SIGKILL, USR2, a reload", allowed=1)
        systemctl("restart", service.unit)
        assert service.status()["generations"][0]["release"] == "2"
        ask_line(service.port)

        current.unlink()
        current.symlink_to(site / "releases" / "bad")
        assert run("systemctl", "reload", service.unit).returncode != 0
        assert "current names bad, which failed" in service.ctl("status").stdout
        ask_line(service.port)
        done = service.ctl("deploy", "2", "--force")
        assert done.returncode == 0, done.stderr
        stopped_in_order(service)
    shutil.rmtree(site)


# -- what the unit allows ------------------------------------------------------


_CLIENTS = 30


def _come_one_by_one(service: Service) -> None:
    for _ in range(_CLIENTS):
        ask_line(service.port)


def _is_awake(service: Service, wanted: bool, say: Say) -> bool:
    """Whether the next client is awaited awake; else a timer may be due now and then."""
    times = waits_awake(service.pid, partial(_come_one_by_one, service))
    say(f"{_CLIENTS} clients: asked {times} times without waiting")
    return times > 10 * _CLIENTS if wanted else times < 3 * _CLIENTS


@promise("CPUQuota=50%: no busy polling; by systemctl set-property it changes at once")
def _(say: Say) -> None:
    if os.cpu_count() == 1:
        raise NotRun("this machine has one processor, and there is no busy polling on that")
    with Service("quota", options="--busy-poll 10s", drop_in=["CPUQuota=50%"]) as service:
        service.start()
        assert _is_awake(service, False, say)
        # Where no unit has a quota there is no such file; it comes again while the protector runs.
        for quota, awake in (("150%", True), ("", True), ("50%", False)):
            systemctl("set-property", "--runtime", service.unit, f"CPUQuota={quota}")
            limit = Path("/sys/fs/cgroup", service.show("ControlGroup").lstrip("/"), "cpu.max")
            told = limit.read_text(encoding="ascii") if limit.exists() else "not there"
            say(f"CPUQuota={quota}: cpu.max {told.strip()}")
            eventually(partial(_is_awake, service, awake, say), f"awake: {awake}", 300)
        stopped_in_order(service)
        run("systemctl", "revert", service.unit)


# -- socket activation ---------------------------------------------------------


def _listening(port: int) -> int:
    """How many sockets listen on a port of 127.0.0.1."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()
    return sum(line.split()[1:4:2] == [f"0100007F:{port:04X}", "0A"] for line in lines)


def _activated(
    name: str, command: str, options: str, say: Say, *drop_in: str, sockets: int = 1
) -> None:
    """Reloads, a killed protector, and a restart, on a port that systemd has opened.

    sockets: as many are there while the protector is.
    """
    with Service(name, command, options, drop_in=drop_in) as service:
        service.opened_by_systemd()
        assert service.show("ActiveState") == "inactive"
        with load_on(service) as load:
            assert service.show("ActiveState") == "active"
            with closing(Held(service.port)) as held:
                first = held.ask()
                for act in (service.reload, service.upgrade, service.kill, service.reload):
                    act()
                    load.more()
                    assert _listening(service.port) == sockets
                assert held.ask() == first
            # Of two sockets the third generation accepts from systemd's own, where more come while
            # it is told to finish, and it is that server's affair what it does with them.
            service.reload()
            systemctl("restart", service.unit)
            load.more()
            assert _listening(service.port) == sockets
            service.reload()
            load.more()
            systemctl("stop", service.unit)
            # systemd listens on, and starts it for the next client.
            load.more()
            assert service.show("ActiveState") == "active"
            none_failed(load, say, "4 reloads, an upgrade, a SIGKILL, a restart, a stop", allowed=1)


@promise("a port of a .socket unit loses no client, not even at a restart")
def _(say: Say) -> None:
    _activated("socket", ECHO, "", say)


@promise("fd:NAME takes the socket of a .socket unit by its name")
def _(say: Say) -> None:
    with Service("named", listen="fd:front") as service:
        service.opened_by_systemd("FileDescriptorName=front")
        ask_line(service.port)
        assert service.show("ActiveState") == "active"


# -- Type=notify-reload --------------------------------------------------------


@promise("Type=notify-reload reloads, and says nothing of a failure but in the status")
def _(say: Say) -> None:
    if (version := systemd_version()) < 253:
        raise NotRun(f"systemd {version} has no Type=notify-reload, 253 has")
    release = Path("/opt/notify-release")
    good = f"#!/bin/sh\nexec {ECHO}\n"
    release.write_text(good)
    release.chmod(0o755)
    with (
        Service("notify", str(release), drop_in=["Type=notify-reload", "ExecReload="]) as service,
        load_on(service.start()) as load,
    ):
        for generation in (2, 3):
            service.reload()
            assert service.status_text == f"generation {generation} is serving"
            load.more()
        release.write_text("#!/bin/sh\nexit 7\n")
        service.reload()
        assert "exited with status 7" in service.status_text, service.status_text
        release.write_text(good)
        service.reload()
        service.kill()
        service.reload()
        load.more()
        none_failed(load, say, "5 reloads and a SIGKILL", allowed=1)
    release.unlink()


# -- users, other units --------------------------------------------------------


@promise("an edit of the settings and a reload is enough; a mistake in them makes it fail in words")
def _(say: Say) -> None:
    with Service("edited") as service, load_on(service.start()) as load:
        [worker] = service.workers()
        service.settle(workers=0, colour="red")
        done = run("systemctl", "reload", service.unit)
        assert done.returncode != 0, "systemctl reload said that it worked"
        said = service.journal()
        for mistake in ("colour: unknown key", "workers: 0 is not in the range"):
            assert f"{service.settings} line" in said, said
            assert mistake in said, said
        assert service.workers() == [worker]
        load.more()

        service.settle(workers=2)
        service.forget("colour")
        service.reload()
        assert len(service.workers()) == 2
        load.more()
        none_failed(load, say, "a mistake in the settings, and two workers")
        assert worker not in service.workers()
        named = run("journalctl", "-b", "-o", "cat", "-t", "edited").stdout
        assert "event=configured" in named, named


@promise("a start by the unit as root wants to be told so, and is not tried again")
def _(say: Say) -> None:
    with Service("nobodys", user="") as service:
        assert run("systemctl", "start", service.unit).returncode != 0
        assert service.show("ExecMainStatus") == "2"
        assert service.show("NRestarts") == "0"
        assert f'write user = "NAME" in {service.settings}' in service.journal()


@promise("user = in the settings: protector and workers are that user, and keep it that way")
def _(say: Say) -> None:
    with Service("user", user="nobody") as service:
        service.start()
        with load_on(service) as load:
            # systemd gives the folder to the unit's user whenever it executes something for it.
            for act in (service.reload, service.reload, service.upgrade, service.kill):
                act()
                load.more()
                for pid in service.processes():
                    assert os.stat(f"/proc/{pid}").st_uid == 65534, pid
            none_failed(load, say, "2 reloads, an upgrade and a SIGKILL", allowed=1)
        systemctl("restart", service.unit)
        ask_line(service.port)
        stopped_in_order(service)
        assert not Path(service.control).parent.exists()
        said = service.journal(200)
        assert "notice" not in said, said
        assert "notify-socket-abstract" not in said, said


@promise("without root at all: User= and one capability, by the drop-in of docs/systemd.md")
def _(say: Say) -> None:
    drop_in = ["User=nobody", "AmbientCapabilities=CAP_NET_BIND_SERVICE"]
    listen = "127.0.0.1:{port} 127.0.0.1:80"
    with Service("rootless", user="", drop_in=drop_in, listen=listen) as service:
        service.start()
        with load_on(service) as load:
            service.reload()
            service.upgrade()
            service.kill()
            load.more()
            ask_line(80)
            none_failed(load, say, "a reload, an upgrade and a SIGKILL", allowed=1)
        stopped_in_order(service)


@promise("DynamicUser= and LoadCredential=, by the drop-in of docs/systemd.md")
def _(say: Say) -> None:
    secret, seen = Path("/etc/secret.key"), "/run/socketprotector/dynamic/seen"
    secret.write_text("it is secret\n", encoding="ascii")
    secret.chmod(0o600)
    command = f"/bin/sh -c 'cat $CREDENTIALS_DIRECTORY/key >{seen}; exec choom -n 0 -- {ECHO}'"
    drop_in = [
        "DynamicUser=yes",
        "AmbientCapabilities=CAP_NET_BIND_SERVICE",
        f"LoadCredential=key:{secret}",
        "OOMScoreAdjust=-500",
    ]
    with Service("dynamic", command, user="", drop_in=drop_in, listen="127.0.0.1:{port} 81") as (
        service
    ):
        service.start()
        with load_on(service) as load:
            users = {os.stat(f"/proc/{pid}").st_uid for pid in service.processes()}
            say(f"users: {users}")
            assert len(users) == 1
            assert 61184 <= users.pop() <= 65519
            assert Path(seen).read_text(encoding="ascii") == "it is secret\n"
            assert (
                os.readlink("/run/socketprotector/dynamic") == "../private/socketprotector/dynamic"
            )
            assert Path("/run/private").stat().st_mode & 0o777 == 0o700
            service.reload()
            service.upgrade()
            service.kill()
            load.more()
            [worker] = {ask_line(81)}
            said = [_oom_score_adjust(pid) for pid in (service.pid, worker)]
            say(f"oom_score_adj of protector and worker: {said}")
            assert said == [-500, 0]
            none_failed(load, say, "a reload, an upgrade and a SIGKILL", allowed=1)
        stopped_in_order(service)
    # For root they are root's.
    command = f"/bin/sh -c 'cat $CREDENTIALS_DIRECTORY/key; exec {ECHO}'"
    with Service("key", command, user="nobody", drop_in=drop_in[2:3]) as service:
        ask_line(service.start().port)
        words = service.journal()
        assert "/run/credentials/" in words, words
        assert "Permission denied" in words, words
    secret.unlink()


def _oom_score_adjust(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text(encoding="ascii"))


@promise("socketprotector.service, the one for a single daemon, does the same")
def _(say: Say) -> None:
    with Service("default", unit="socketprotector.service") as service:
        service.start()
        with load_on(service) as load:
            service.reload()
            assert service.status_text == "generation 2 is serving"
            service.kill()
            service.upgrade()
            load.more()
            none_failed(load, say, "a reload, a SIGKILL and an upgrade", allowed=1)
        stopped_in_order(service)


@promise("the exporter's unit answers for all instances, also for those of other users")
def _(say: Say) -> None:
    unit = "socketprotector-exporter.service"

    def pages() -> str:
        with urllib.request.urlopen("http://127.0.0.1:9517/metrics", timeout=60) as page:
            text: str = page.read().decode()
            return text

    def both() -> bool:
        try:
            up = set(re.findall(r'socketprotector_up\{instance="(\w+)"\} 1', pages()))
        except OSError:
            return False  # it does not listen yet
        return {"one", "two"} <= up

    run("groupadd", "--system", "--force", "socketprotector-status")
    with Service("one") as one, Service("two", user="nobody") as two:
        one.start()
        two.start()
        try:
            systemctl("start", unit)
            eventually(both, "both instances in the metrics")
        except AssertionError:
            say(run("journalctl", "-b", "-o", "cat", "-n", "30", "-u", unit).stdout)
            raise
        finally:
            systemctl("stop", unit)


# -- listener handoff ----------------------------------------------------------


def _torment(service: Service, load: Load) -> None:
    """What keeps or replaces a program while the same listeners go on."""
    for act in (service.reload, service.upgrade, service.kill, service.reload):
        act()
        load.more()


@promise("listener handoff, asyncio server: reload, USR2, SIGKILL of the protector lose no client")
def _(say: Say) -> None:
    with (
        Service("asyncio", ASYNCIO, f"{LISTENER} --workers 2") as service,
        load_on(service.start(), clients=4) as load,
    ):
        _torment(service, load)
        none_failed(load, say, "2 reloads, an upgrade, a SIGKILL")
        stopped_in_order(service)


@promise("listener handoff, uvicorn: reload, USR2 and SIGKILL of the protector lose no client")
def _(say: Say) -> None:
    command = (
        f"{PYTHON} -m uvicorn --loop asyncio --app-dir {SERVERS} --no-access-log"
        " --fd 3 asgi_app:app"
    )
    with (
        Service("uvicorn", command, LISTENER) as service,
        load_on(service.start(), ask_http) as load,
    ):
        _torment(service, load)
        none_failed(load, say, "2 reloads, an upgrade, a SIGKILL")


@promise("listener handoff, gunicorn: reload, USR2 and SIGKILL of the protector lose no client")
def _(say: Say) -> None:
    command = f"{PYTHON} -m gunicorn --workers 2 --chdir {SERVERS} wsgi_app:app"
    with (
        Service("gunicorn", command, LISTENER) as service,
        load_on(service.start(), ask_http) as load,
    ):
        _torment(service, load)
        none_failed(load, say, "2 reloads, an upgrade, a SIGKILL")


@promise("listener handoff, a port of a .socket unit: each generation its socket, no client lost")
def _(say: Say) -> None:
    # As docs/systemd.md says: without it a poll can end in a hanging accept() at our restart.
    _activated("handed", ASYNCIO, LISTENER, say, "NonBlocking=yes", sockets=2)


def _ended(pids: set[int]) -> bool:
    return not any(map(lives, pids))


def _family(service: Service) -> set[int]:
    """The workers of the generation that serves, and their children."""
    masters = set(service.workers())
    return masters | {pid for pid in service.processes() if parent_of(pid) in masters}


@promise(
    "listener handoff, pre-fork server: the children of a killed master finish, no client is lost"
)
def _(say: Say) -> None:
    with (
        Service("prefork", PREFORK, LISTENER) as service,
        load_on(service.start(), clients=3) as load,
    ):
        for what in ("its parent is the protector", "its parent is systemd"):
            if what == "its parent is systemd":
                service.kill()
            # The generation before may still be ending.
            eventually(lambda: len(_family(service)) == 4, "a master and its 3 children")
            [master], old = service.workers(), _family(service)
            os.kill(master, signal.SIGKILL)
            eventually(partial(_ended, old), f"the end of the children of a killed master, {what}")
            load.more()
            assert not old & set(service.processes())
            service.reload()
            load.more()
        none_failed(load, say, "2 SIGKILLs of a master, one of the protector, 2 reloads")
        stopped_in_order(service)


# -- without systemd -----------------------------------------------------------


@promise("a process group's number that another group has by now is not signalled")
def _(say: Say) -> None:
    version = tuple(map(int, os.uname().release.split(".")[:2]))
    for reaped_by in ("us", "adopted"):
        assert takes_a_number.run(reaped_by) == "lived"
    unasked = takes_a_number.run("adopted", "unasked")
    say(f"Linux {version[0]}.{version[1]}: the other group lived; if not asked for, it {unasked}")
    assert unasked == ("was killed" if version < (6, 9) else "lived")


@promise("--guard outlives protector and guard, on this kernel")
def _(say: Say) -> None:
    with Service("guarded") as names:  # for its port
        port = names.port
        control = "/run/guarded"
        with open("/run/guarded.log", "wb") as log:
            guard = subprocess.Popen(
                [
                    *("SocketProtector", "-f", "--guard", "--control", control, "--workers", "2"),
                    *(f"127.0.0.1:{port}", "--", *ECHO.split()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        names.control = control
        try:
            eventually(lambda: names.restarted(0), "the protector's answer")
            with load_on(names) as load, closing(Held(port)) as held:
                first = held.ask()
                assert names.ctl("reload", "--wait").returncode == 0
                load.more()
                for _ in range(2):
                    status = names.status()
                    os.kill(status["pid"], signal.SIGKILL)
                    eventually(
                        partial(names.restarted, status["restarts"] + 1), "another protector"
                    )
                    load.more()
                names.upgrade(partial(names.ctl, "upgrade", "--wait"))
                load.more()
                guard.kill()
                guard.wait()
                load.more()
                assert names.ctl("reload", "--wait").returncode == 0
                load.more()
                assert held.ask() == first
                none_failed(
                    load,
                    say,
                    "2 SIGKILLs of the protector, an upgrade, one of the guard",
                    allowed=2,
                )
            assert names.ctl("stop", "--wait").returncode == 0
            eventually(lambda: is_refused(port), "a port without a listener")
        except AssertionError:
            say(Path("/run/guarded.log").read_text(encoding="utf-8", errors="replace"))
            raise
        finally:
            guard.kill()
            guard.wait()
