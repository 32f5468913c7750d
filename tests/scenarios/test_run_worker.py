"""What a worker is started with, how it says that it is ready, and which senders are believed."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import needs
from tests.procfs import descriptors
from tests.running import DEADLINE_S, FAIR_START_S, WORKERS, Client, Protector, ask, eventually
from tests.scenarios.tools import (
    EITHER_HANDOFF,
    Gate,
    kinds_at_rest,
    no_more_open,
    pid_in,
    spawned,
    worker,
)

Start = Callable[..., Protector]
MANY_SILENT = " ".join(worker("many", "--silent"))

NOBODY = 65534

needs_root = needs.ANOTHER_USER
needs_systemd_notify = needs.programs("systemd-notify")


def told(daemon: Protector) -> dict[str, Any]:
    """What the worker tells.py says of itself."""
    answer: dict[str, Any] = json.loads(ask(("127.0.0.1", daemon.port)))
    return answer


# -- what it is started with -------------------------------------------------------


def test_no_descriptor_reaches_a_worker_but_those_named(protector: Start) -> None:
    leaky = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(leaky, True)
    try:
        daemon = protector("127.0.0.1:0", "unix:@sp-leak-test", "--", *worker("tells")).ready()
    finally:
        os.close(leaky)

    for _ in range(3):
        seen = told(daemon)
        environment = seen["environment"]
        named = {environment["SOCKETPROTECTOR_CHANNEL"], environment["SOCKETPROTECTOR_RETURN"]}
        if "SOCKETPROTECTOR_SCOREBOARD" in environment:
            named.add(environment["SOCKETPROTECTOR_SCOREBOARD"].partition(":")[0])
        assert set(seen["descriptors"]) == {"0", "1", "2", *named}
        assert seen["descriptors"]["0"] == "/dev/null"
        daemon.reload()
    daemon.stop()


@pytest.mark.costly
def test_a_replacement_gets_no_other_descriptors_either(protector: Start) -> None:
    daemon = protector("--workers", "3", "127.0.0.1:0", "--", *worker("tells")).ready()
    os.kill(spawned(daemon)[0], signal.SIGKILL)
    eventually(lambda: daemon.log.count("event=worker-ready") == 4, "the replacement")

    for pid in daemon.worker_pids():
        eventually(lambda pid=pid: set(descriptors(pid)) == {*range(6)}, "its descriptors")  # type: ignore[misc]
    daemon.stop()


def test_a_worker_gets_the_environment_of_the_contract(protector: Start, tmp_path: Path) -> None:
    outer = {
        "SOCKETPROTECTOR_CHANNEL": "77",
        "SOCKETPROTECTOR_SOMETHING": "outer",
        "LISTEN_FDS": "0",
        "LISTEN_PID": "1",
        "LISTEN_FDNAMES": "outer",
        "WATCHDOG_USEC": "10000000",
        "WATCHDOG_PID": "1",
        "NOTIFY_SOCKET": str(tmp_path / "outer"),
        "OTHER": "reaches it",
    }
    command = worker("tells", "an argument", "")
    daemon = protector("127.0.0.1:0", "unix:@sp env test", "--", *command, **outer).ready()

    seen = told(daemon)

    environment = seen["environment"]
    ours = {
        name: value
        for name, value in environment.items()
        if name.startswith(("SOCKETPROTECTOR_", "LISTEN_", "WATCHDOG_"))
    }
    ours.pop("SOCKETPROTECTOR_SCOREBOARD", None)
    assert ours == {
        "SOCKETPROTECTOR_CHANNEL": "3",
        "SOCKETPROTECTOR_RETURN": "4",
        "SOCKETPROTECTOR_LISTENERS": f"tcp:127.0.0.1:{daemon.port} unix:@sp%20env%20test",
        "SOCKETPROTECTOR_GENERATION": "1",
        "SOCKETPROTECTOR_WORKER": "0",
        "SOCKETPROTECTOR_WORKERS": "1",
    }
    assert environment["NOTIFY_SOCKET"].startswith("/")
    assert environment["NOTIFY_SOCKET"] != outer["NOTIFY_SOCKET"]
    assert environment["OTHER"] == "reaches it"
    assert seen["argv"][1:] == ["an argument", ""]
    daemon.reload()
    assert told(daemon)["environment"]["SOCKETPROTECTOR_GENERATION"] == "2"
    assert told(daemon)["environment"]["NOTIFY_SOCKET"] != environment["NOTIFY_SOCKET"]
    daemon.stop()


@pytest.mark.costly
def test_each_worker_leads_a_session_of_its_own(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("tells")).ready()

    seen = told(daemon)

    assert seen["session"] == seen["group"] == seen["pid"]
    daemon.stop()


@pytest.mark.costly
def test_a_worker_starts_with_default_signals_and_an_empty_mask(
    protector: Start, tmp_path: Path
) -> None:
    """Looked at through a shell: Python would have changed them for itself."""
    found = tmp_path / "status"
    # With builtins alone: dash blocks all signals while it starts a command.
    copy = f'while read -r line; do echo "$line"; done < /proc/$$/status > {found}'
    script = f"{copy}; exec {' '.join(worker('many'))}"
    program = (
        "import os, sys; from signal import *;"
        "pthread_sigmask(SIG_BLOCK, [SIGUSR1, SIGTERM, SIGCHLD]);"
        "[signal(each, SIG_IGN) for each in (SIGTTIN, SIGPIPE, SIGCHLD, SIGQUIT, SIGHUP)];"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    receive, send = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", program, sys.executable, "-m", "socketprotector"),
            *("-f", "127.0.0.1:0", "--", "/bin/sh", "-c", script),
        ],
        stderr=send,
    )
    os.close(send)
    with open(receive, encoding="utf-8") as log:
        assert any("event=ready" in line for line in log)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0, log.read()

    status = dict(line.partition(":")[::2] for line in found.read_text().splitlines())
    assert int(status["SigBlk"], 16) == 0
    # 32 and 33 are glibc's own: its posix_spawn leaves them ignored, its threads set them.
    assert int(status["SigIgn"], 16) & ~(0b11 << 31) == 0


@pytest.mark.costly
def test_limits_umask_directory_and_nice_are_the_workers_alone(
    protector: Start, tmp_path: Path
) -> None:
    options = ("--limit", "nofile=333", "--limit", "core=0", "--limit", "nice=3")
    place = ("--umask", "027", "--chdir", tmp_path)
    daemon = protector(*options, *place, "127.0.0.1:0", "--", *worker("tells")).ready()

    seen = told(daemon)

    assert (seen["nofile"][0], seen["core"][0], seen["umask"]) == (333, 0, 0o027)
    assert (seen["directory"], seen["nice"]) == (str(tmp_path), os.getpriority(0, 0) + 3)
    soft, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    assert soft == hard
    assert os.getpriority(os.PRIO_PROCESS, daemon.pid) == os.getpriority(0, 0)
    daemon.stop()


@pytest.mark.costly
def test_a_worker_has_the_callers_soft_limit_on_descriptors(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("tells")).ready()

    assert told(daemon)["nofile"] == list(resource.getrlimit(resource.RLIMIT_NOFILE))
    daemon.stop()


def test_ctrl_c_of_the_protectors_terminal_does_not_reach_a_worker(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()

    os.killpg(daemon.pid, signal.SIGUSR1)  # would kill a worker in the protector's group

    daemon.log.wait_for("event=reopened")
    assert ask(("127.0.0.1", daemon.port)).startswith(f"[{spawned(daemon)[0]}]")
    daemon.stop()


# -- readiness -----------------------------------------------------------------------


@needs_systemd_notify
def test_systemd_notify_says_ready_and_is_gone_when_it_is_read(protector: Start) -> None:
    script = f"systemd-notify --ready; exec {MANY_SILENT}"
    daemon = protector("127.0.0.1:0", "--", "/bin/sh", "-c", script).ready()

    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.stop()


def test_a_sender_that_is_gone_already_is_believed(protector: Start, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    say = f"{sys.executable} -S -E {WORKERS / 'says.py'} READY=1"
    script = f"cat {gate.path}; {say}; echo said >&2; exec {MANY_SILENT}"
    daemon = protector("127.0.0.1:0", "--", "/bin/sh", "-c", script)
    daemon.log.wait_for("event=spawned")

    daemon.signal(signal.SIGSTOP)
    gate.open()
    daemon.log.wait_for("^said$")  # the one that said READY has ended and was waited for
    daemon.signal(signal.SIGCONT)

    daemon.ready()
    daemon.stop()


@needs_root
def test_a_worker_that_drops_root_before_ready_is_believed(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("drops_root")).ready()

    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.stop()


@needs_root
@EITHER_HANDOFF
def test_a_stranger_is_not_believed(protector: Start, tmp_path: Path) -> None:
    script = f'echo "at=$NOTIFY_SOCKET" >&2; exec {" ".join(worker("never_ready"))}'
    daemon = protector("--start-timeout", "60s", "127.0.0.1:0", "--", "/bin/sh", "-c", script)
    address = daemon.log.wait_for("^at=").partition("=")[2]

    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
                stranger.sendto(b"READY=1", address)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    mark = daemon.signal(signal.SIGUSR1)
    daemon.log.wait_for("event=reopened", after=mark)

    assert daemon.log.count("event=worker-ready") == 0
    daemon.process.send_signal(signal.SIGINT)
    daemon.wait()


@pytest.mark.costly
def test_ready_after_a_time_needs_no_word(protector: Start) -> None:
    daemon = protector("--ready", "after:0.2s", "127.0.0.1:0", "--", *worker("many", "--silent"))
    daemon.ready()

    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.stop()


@EITHER_HANDOFF
def test_extend_timeout_gives_a_slow_start_more_time(protector: Start, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    say = f"{sys.executable} -S -E {WORKERS / 'says.py'}"
    script = (
        f"{say} EXTEND_TIMEOUT_USEC=60000000; echo asked >&2; cat {gate.path};"
        f"{say} READY=1; exec {MANY_SILENT}"
    )
    daemon = protector(
        "--start-timeout", f"{FAIR_START_S}s", "127.0.0.1:0", "--", "/bin/sh", "-c", script
    )
    daemon.log.wait_for("^asked$")
    # The other way to see that this time has passed: a start that was given just that long.
    other = protector(
        "--start-timeout", f"{FAIR_START_S}s", "127.0.0.1:0", "--", *worker("never_ready")
    )
    assert other.wait() == 3

    gate.open()

    daemon.ready()
    daemon.stop()


@pytest.mark.costly
def test_nonsense_on_the_notify_socket_does_no_harm(protector: Start) -> None:
    command = worker("says_nonsense")
    daemon = protector("127.0.0.1:0", "--", *command).ready()
    kinds = kinds_at_rest(daemon)

    for _ in range(3):
        assert ask(("127.0.0.1", daemon.port)).endswith("] hello")

    no_more_open(kinds, daemon.pid)
    daemon.stop()


def test_a_barrier_is_passed_when_all_before_it_is_handled(protector: Start) -> None:
    """What systemd-notify waits for before it ends: its descriptor closed by the reader."""
    daemon = protector("127.0.0.1:0", "--", *worker("waits_at_barrier")).ready()

    daemon.log.wait_for("^passed$")
    said = daemon.log.text()
    assert said.index("event=worker-ready") < said.index("passed")
    daemon.stop()


# -- scaling -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["minimal", "library"])
def test_ttin_and_ttou_start_and_retire_a_worker(kind: str, protector: Start) -> None:
    """One on the library leaves at the end of its RETURN line, another by TERM."""
    command = worker("many") if kind == "minimal" else (sys.executable, WORKERS / "echo.py")
    daemon = protector("127.0.0.1:0", "--", *command).ready()
    with Client(("127.0.0.1", daemon.port)) as client:
        client.ask()
        mark = daemon.signal(signal.SIGTTIN)
        daemon.log.wait_for("event=worker-ready generation=1 worker=2", after=mark)
        assert len(daemon.worker_pids()) == 2

        mark = daemon.signal(signal.SIGTTOU)
        daemon.log.wait_for('event=exited generation=1 worker=2 how="exited with', after=mark)

        assert client.ask("still") == f"[{spawned(daemon)[0]}] still"
    assert daemon.worker_pids() == spawned(daemon)[:1]
    asked = "event=signalled worker=2 signal=TERM" if kind == "minimal" else "event=retired"
    assert daemon.log.count(asked) == 1
    daemon.stop()


@pytest.mark.costly
def test_a_retiring_worker_finishes_what_it_has(protector: Start) -> None:
    daemon = protector("--workers", "2", "127.0.0.1:0", "--", sys.executable, WORKERS / "echo.py")
    daemon.ready()
    clients = [Client(("127.0.0.1", daemon.port)) for _ in range(10)]
    owners = [pid_in(client.ask()) for client in clients]

    mark = daemon.signal(signal.SIGTTOU)
    daemon.log.wait_for("event=retired", after=mark)

    assert [pid_in(client.ask()) for client in clients] == owners
    for client in clients:
        client.close()
    eventually(lambda: len(daemon.worker_pids()) == 1, "one worker left")
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_reload_starts_as_many_workers_as_are_wanted_by_now(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    for number in (2, 3):
        mark = daemon.signal(signal.SIGTTIN)
        daemon.log.wait_for(f"event=worker-ready generation=1 worker={number}", after=mark)

    daemon.reload()

    assert len(spawned(daemon, 2)) == 3
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_there_is_always_one_worker(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()

    mark = daemon.signal(signal.SIGTTOU)

    daemon.log.wait_for("event=refused .*cannot go below 1 worker", after=mark)
    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.stop()


@pytest.mark.costly
def test_usr1_reopens_the_log(protector: Start, tmp_path: Path) -> None:
    log = tmp_path / "log"
    daemon = protector("--log-file", log, "127.0.0.1:0", "--", *worker("many"))
    eventually(lambda: log.exists() and "event=ready" in log.read_text(), "its log")
    log.rename(tmp_path / "log.1")

    daemon.signal(signal.SIGUSR1)

    eventually(lambda: log.exists() and "event=reopened" in log.read_text(), "the new log")
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert "event=stopped" in log.read_text()
    assert "event=stopped" not in (tmp_path / "log.1").read_text()


def test_a_worker_is_scheduled_as_the_caller_was(protector: Start) -> None:
    """The protector gives way to those it wakes (SCHED_BATCH); they do not inherit that."""
    daemon = protector("127.0.0.1:0", "--", *worker("minimal")).ready()
    [pid] = daemon.worker_pids()

    raised = os.getpriority(os.PRIO_PROCESS, 0) < 0  # then it keeps what it was given
    expected = os.sched_getscheduler(0) if raised else os.SCHED_BATCH
    assert os.sched_getscheduler(daemon.pid) == expected
    assert os.sched_getscheduler(pid) == os.sched_getscheduler(0)
    daemon.stop()
