"""What is said to systemd, heard on a notify socket of the test's own; and the shipped units."""

from __future__ import annotations

import json
import os
import pwd
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from socketprotector.system.sd_notify import Outbox, Systemd
from tests import needs
from tests.procfs import environment_of
from tests.running import (
    COMMAND,
    DEADLINE_S,
    ROOT,
    WORKERS,
    Client,
    Protector,
    ask,
    eventually,
    wait_gone,
)
from tests.scenarios.adopting import Installation, at_rest
from tests.scenarios.managers import Manager
from tests.scenarios.tools import Gate
from tests.systems.life import under_unit

UNITS = ROOT / "init.d"
EXPORTERS = UNITS.parent / "exporter" / "init.d"
ECHO = (sys.executable, str(WORKERS / "echo.py"))


@pytest.fixture(params=["path", "abstract"])
def each_manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(
        f"@socketprotector-test-{os.urandom(8).hex()}"
        if request.param == "abstract"
        else str(tmp_path / "notify")
    )
    yield manager
    manager.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.close()


@pytest.fixture
def service(protector: Callable[..., Protector], manager: Manager) -> Callable[..., Protector]:
    """Start a protector that speaks to the manager: service(*options, **environment)."""

    def start(*options: str, command: tuple[str, ...] = ECHO, **environment: str) -> Protector:
        return protector(
            *options, "127.0.0.1:0", "--", *command, NOTIFY_SOCKET=manager.address, **environment
        )

    return start


def release(path: Path, text: str) -> None:
    """Put a release of the daemon, a shell script, in the place of the one before."""
    new = path.with_suffix(".new")
    new.write_text(f"#!/bin/sh\n{text}\n")
    new.chmod(0o755)
    new.rename(path)


# --- the protocol -------------------------------------------------------------


def test_ready_comes_with_main_pid_and_status_when_the_first_generation_serves(
    each_manager: Manager, protector: Callable[..., Protector]
) -> None:
    daemon = protector("127.0.0.1:0", "--", *ECHO, NOTIFY_SOCKET=each_manager.address)

    assert each_manager.hear() == {
        "READY": "1",
        "MAINPID": str(daemon.pid),
        "STATUS": "generation 1 is serving",
    }
    assert each_manager.sender == daemon.pid
    daemon.stop()


def test_a_reload_is_announced_with_its_time_and_then_ready_again(
    service: Callable[..., Protector], manager: Manager
) -> None:
    daemon = service()
    manager.wait_for("READY")

    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    daemon.signal(signal.SIGHUP)
    reloading = manager.hear()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000

    assert reloading["RELOADING"] == "1"
    assert before <= int(reloading["MONOTONIC_USEC"]) <= after
    assert manager.hear() == {"READY": "1", "STATUS": "generation 2 is serving"}
    daemon.stop()


def test_a_failed_reload_is_ready_again_with_a_status_that_says_so(
    service: Callable[..., Protector], manager: Manager, tmp_path: Path
) -> None:
    path = tmp_path / "daemon"
    release(path, f"exec {shlex.join(ECHO)}")
    daemon = service(command=(str(path),))
    manager.wait_for("READY")
    release(path, "exit 3")

    daemon.signal(signal.SIGHUP)

    assert manager.hear()["RELOADING"] == "1"
    ready = manager.hear()
    assert ready["READY"] == "1"
    assert ready["STATUS"].startswith("reload failed: ")
    assert str(path) in ready["STATUS"]
    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.stop()


def test_a_failed_start_is_never_ready_and_says_why(
    service: Callable[..., Protector], manager: Manager, tmp_path: Path
) -> None:
    path = tmp_path / "daemon"
    release(path, "exit 3")

    daemon = service("--start-tries", "1", command=(str(path),))

    heard = [manager.hear()]
    while not heard[-1].get("STATUS", "").startswith("start failed: "):
        heard.append(manager.hear())
    assert daemon.wait() == 3
    heard += manager.rest()
    assert not [fields for fields in heard if "READY" in fields]


def test_a_stop_is_announced_with_the_time_it_may_need(
    service: Callable[..., Protector], manager: Manager
) -> None:
    daemon = service("--stop-timeout", "100s", "--kill-timeout", "10s")
    manager.wait_for("READY")

    daemon.signal(signal.SIGTERM)

    stopping = manager.hear()
    assert stopping["STOPPING"] == "1"
    assert stopping["STATUS"] == "stopping"
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) > 110_000_000
    assert daemon.wait() == 0


@pytest.mark.costly
def test_the_watchdog_is_fed_when_it_watches_this_process(
    manager: Manager, marked_environment: dict[str, str]
) -> None:
    # The shell knows the pid, and becomes the protector.
    process = subprocess.Popen(
        ["sh", "-c", 'WATCHDOG_PID=$$ exec "$@"', "sh", *COMMAND, "-f", "127.0.0.1:0", "--", *ECHO],
        env={
            **os.environ,
            **marked_environment,
            "NOTIFY_SOCKET": manager.address,
            "WATCHDOG_USEC": "100000",
        },
    )
    manager.wait_for("READY")

    manager.wait_for("WATCHDOG")
    manager.wait_for("WATCHDOG")

    assert manager.sender == process.pid
    process.terminate()
    assert process.wait(DEADLINE_S) == 0


def test_the_watchdog_is_fed_when_no_process_is_named(
    service: Callable[..., Protector], manager: Manager
) -> None:
    daemon = service(WATCHDOG_USEC="100000")

    manager.wait_for("WATCHDOG")
    manager.wait_for("WATCHDOG")

    daemon.stop()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "²"},
    ],
    ids=["unasked", "another's", "off", "nonsense"],
)
def test_no_watchdog_is_fed_that_does_not_watch_this_process(
    service: Callable[..., Protector], manager: Manager, environment: dict[str, str]
) -> None:
    # No sleep: it would be fed first of all, before READY.
    daemon = service(**environment)
    assert manager.hear()["READY"] == "1"

    daemon.stop()

    assert not [fields for fields in manager.rest() if "WATCHDOG" in fields]


@pytest.mark.costly
def test_a_full_notify_socket_blocks_nothing_and_hears_all_of_it_later(
    service: Callable[..., Protector], manager: Manager
) -> None:
    noise = manager.fill()

    daemon = service(WATCHDOG_USEC="30000000").ready()

    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.reload()
    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")

    heard = [manager.hear() for _ in range(noise + 4)]
    told = [next(iter(fields)) for fields in heard[noise:]]
    assert told == ["WATCHDOG", "READY", "RELOADING", "READY"]
    daemon.stop()


def test_feeding_the_watchdog_pushes_nothing_out_that_waits_for_a_full_socket(
    manager: Manager,
) -> None:
    again: list[Callable[[], None]] = []
    outbox = Outbox(again.append, address=manager.address)
    systemd = Systemd({}, os.getpid(), outbox)
    noise = manager.fill()

    systemd.send(READY="1")
    for _ in range(100):
        systemd.send(WATCHDOG="1")
    systemd.send(STATUS="x")
    for _ in range(noise):
        manager.hear()
    again[-1]()

    assert [manager.hear() for _ in range(3)] == [
        {"READY": "1"},
        {"WATCHDOG": "1"},
        {"STATUS": "x"},
    ]
    outbox.close()


@pytest.mark.costly
def test_a_stop_does_not_wait_for_a_full_notify_socket(
    service: Callable[..., Protector], manager: Manager
) -> None:
    daemon = service()
    manager.wait_for("READY")
    manager.fill()

    daemon.stop()


@pytest.mark.parametrize("reads_on", [True, False])
@pytest.mark.costly
def test_an_upgrade_waits_for_a_full_notify_socket_but_not_for_ever(
    manager: Manager, installation: Installation, tmp_path: Path, reads_on: bool
) -> None:
    gate = Gate(tmp_path / "gate")
    if not reads_on:
        installation.change(
            "one", "daemon/supervisor", r"_LONGEST_WAIT_S = .*", "_LONGEST_WAIT_S = 3.0"
        )
    installation.environment = {**installation.environment, "NOTIFY_SOCKET": manager.address}
    daemon = installation.start("127.0.0.1:0", "--", *ECHO).ready()
    manager.wait_for("READY")
    installation.add("two", version="2.0.0")
    installation.script(
        "two",
        "if 'sp.probe' in os.environ.get('LISTEN_FDNAMES', ''):\n"
        f"    open({str(gate.path)!r}).read()\n"
        "from socketprotector.__main__ import main\nmain()\n",
    )
    installation.switch("two")

    def begun() -> bool:
        """Not while something still waits for the socket, which was full at the start."""
        mark = daemon.signal(signal.SIGUSR2)
        daemon.log.wait_for("signal=SIGUSR2", after=mark)
        at_rest(daemon)
        return not any("upgrade-failed" in line for line in daemon.log.seen[mark:])

    eventually(begun, "an upgrade")
    noise = manager.fill()
    daemon.reload()  # which has to be told before the new program can go on

    gate.open()

    daemon.log.wait_for("event=upgrade-waits")
    daemon.signal(signal.SIGUSR2)
    daemon.log.wait_for("event=upgrade-under-way")
    if reads_on:
        for _ in range(noise):
            manager.hear()
        assert manager.hear()["RELOADING"] == "1"
        assert manager.hear()["READY"] == "1"
        assert "version=2.0.0" in daemon.log.wait_for("event=resumed")
    else:
        line = daemon.log.wait_for("event=upgrade-failed")
        assert "has not responded for 3s" in line
        mark = daemon.signal(signal.SIGUSR2)
        line = daemon.log.wait_for("event=upgrade-failed", after=mark)
        assert "not all descriptors have reached the guard or systemd" in line
        manager.rest()
    assert daemon.log.count("event=upgrade-waits") == 1
    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.stop()


@pytest.mark.costly
def test_a_notify_socket_that_is_gone_neither_blocks_nor_kills(
    service: Callable[..., Protector], manager: Manager
) -> None:
    daemon = service(WATCHDOG_USEC="1000")
    manager.wait_for("READY")
    manager.close()

    daemon.reload()
    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.stop()


@pytest.mark.parametrize("address", ["@socketprotector-nothing-there", "/", "x" * 300, "vsock:2:9"])
def test_a_notify_socket_that_was_never_there_neither_blocks_nor_kills(
    protector: Callable[..., Protector], address: str
) -> None:
    daemon = protector("127.0.0.1:0", "--", *ECHO, NOTIFY_SOCKET=address).ready()

    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.stop()


@pytest.mark.costly
def test_when_it_detaches_it_says_which_is_the_main_process_and_feeds_the_watchdog(
    manager: Manager, marked_environment: dict[str, str], tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    options = ["--pid-file", str(pid_file), "127.0.0.1:0", "--", *ECHO]
    subprocess.run(
        ["sh", "-c", 'WATCHDOG_PID=$$ exec "$@"', "sh", *COMMAND, *options],
        env={
            **os.environ,
            **marked_environment,
            "NOTIFY_SOCKET": manager.address,
            "WATCHDOG_USEC": "100000",
        },
        check=True,
        timeout=DEADLINE_S,
    )
    pid = int(pid_file.read_text())

    ready = manager.wait_for("READY")
    assert ready["MAINPID"] == str(pid)
    assert manager.sender == pid
    manager.wait_for("WATCHDOG")
    assert manager.sender == pid

    os.kill(pid, signal.SIGTERM)
    manager.wait_for("STOPPING")
    assert wait_gone([pid]) == []


@pytest.mark.costly
def test_workers_get_neither_the_managers_socket_nor_its_watchdog(
    service: Callable[..., Protector], manager: Manager
) -> None:
    daemon = service(WATCHDOG_USEC="30000000")
    manager.wait_for("READY")

    [worker] = daemon.worker_pids()

    environment = environment_of(worker)
    assert not [name for name in environment if name.startswith("WATCHDOG_")]
    assert environment["NOTIFY_SOCKET"] != manager.address
    daemon.stop()


def test_it_is_said_when_no_descriptor_is_left_and_in_bytes_that_can_be_sent(
    manager: Manager,
) -> None:
    # In a process of its own: a limit concerns all of it.
    said = os.fork()
    if said == 0:
        outbox = Outbox(lambda again: None, address=manager.address)
        systemd = Systemd({}, os.getpid(), outbox)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        systemd.send(WATCHDOG="1", STATUS="cannot run /srv/caf\udce9")
        os._exit(0)
    os.waitpid(said, 0)

    assert manager.hear() == {"WATCHDOG": "1", "STATUS": "cannot run /srv/caf\\udce9"}


# --- what the units rely on -----------------------------------------------------


def test_the_workers_of_a_killed_protector_finish_what_they_have_and_end(
    service: Callable[..., Protector], manager: Manager
) -> None:
    """Hence KillMode=process: systemd must not kill them when the protector dies."""
    daemon = service()
    manager.wait_for("READY")
    with Client(("127.0.0.1", daemon.port)) as held:
        first = held.ask("mine")
        [worker] = daemon.worker_pids()

        daemon.process.kill()
        daemon.process.wait(DEADLINE_S)

        assert held.ask("mine") == first == f"[{worker}] mine"
    assert wait_gone([worker]) == []


def shipped(unit: str) -> Path:
    """Where a unit is: the exporter has its own."""
    return next(path for path in (UNITS / unit, EXPORTERS / unit) if path.exists())


def settings_of(unit: str) -> dict[str, list[str]]:
    """A unit's settings, each with its values in order."""
    text = shipped(unit).read_text().replace("\\\n", "")
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def words_of(line: str, runtime: Path, config: Path) -> list[str]:
    """The words behind the program in a unit's command line, for the instance `web`."""
    line = line.replace("%i", "web").replace("/run/socketprotector/web", str(runtime))
    return shlex.split(line.replace("/etc/socketprotector/web.toml", str(config)))[1:]


class Unit:
    """What systemd does for the shipped template: folders, command lines, a notify socket.

    The settings are the shipped example with other values.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.runtime, self.config = folder / "run", folder / "web.toml"
        self.runtime.mkdir()
        # A path would be root's, and systemd's is open to all users.
        self.manager = Manager(f"@socketprotector-test-{os.urandom(8).hex()}")
        settings = settings_of("socketprotector@.service")
        assert settings["RuntimeDirectory"] == ["socketprotector/%i"]
        assert "/run/socketprotector/%i/pid" in settings["ExecStart"][0]
        self._start, self._reload = settings["ExecStart"][0], settings["ExecReload"][0]
        self._environment = {
            **os.environ,
            **environment,
            "NOTIFY_SOCKET": self.manager.address,
            "RUNTIME_DIRECTORY": str(self.runtime),
        }

    def settings(
        self, *lines: str, user: str | None = "root", command: Sequence[str] = ECHO
    ) -> None:
        """Write the example with this user (root's tests alone can have one) and more lines."""
        text = (UNITS / "example.toml").read_text()
        assert self._start.startswith("SocketProtector -f --require-user ")
        values = {"listen": ["127.0.0.1:0"], "command": list(command), "user": user}
        if os.geteuid() != 0:
            values["user"] = None
        for key, value in values.items():
            line = "" if value is None else f"{key} = {json.dumps(value)}"
            text, found = re.subn(rf"^{key} = .*$", line, text, flags=re.MULTILINE)
            assert found == 1, key
        self.config.write_text("\n".join([text, *lines]))

    def start(self, stderr: int = subprocess.PIPE, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *words_of(self._start, self.runtime, self.config)],
            env={**self._environment, **environment},
            stderr=stderr,
            text=True,
        )

    def reload(self) -> subprocess.CompletedProcess[str]:
        assert self._reload.startswith("socketprotectorctl ")
        return subprocess.run(
            [
                *(sys.executable, "-m", "socketprotector.ctl"),
                *words_of(self._reload, self.runtime, self.config),
            ],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )


@pytest.fixture
def unit(marked_environment: dict[str, str]) -> Iterator[Unit]:
    # Not tmp_path: others than root must get there.
    with tempfile.TemporaryDirectory(prefix="socketprotector-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        unit = Unit(folder, marked_environment)
        yield unit
        unit.manager.close()


def ended(process: subprocess.Popen[str]) -> str:
    """Stop it in order; return what it has said."""
    process.terminate()
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    return said


def test_the_units_command_lines_start_and_reload(unit: Unit) -> None:
    unit.settings()

    process = unit.start()
    ready = unit.manager.wait_for("READY")
    assert ready["MAINPID"] == str(process.pid) == (unit.runtime / "pid").read_text().strip()

    assert unit.reload().returncode == 0
    unit.manager.wait_for("RELOADING")
    assert unit.manager.wait_for("READY")["STATUS"] == "generation 2 is serving"

    ended(process)
    assert list(unit.runtime.iterdir()) == []


@pytest.mark.costly
def test_a_reload_of_the_unit_takes_an_edit_and_fails_in_words_on_a_mistake(unit: Unit) -> None:
    unit.settings()
    process = unit.start()
    unit.manager.wait_for("READY")

    unit.settings('colour = "red"', "workers = 0")
    done = unit.reload()

    assert done.returncode != 0
    for mistake in ("colour: unknown key", "workers: 0 is not in the range"):
        assert mistake in done.stderr, done.stderr
    assert str(unit.config) in done.stderr
    assert unit.manager.wait_for("READY")["STATUS"].startswith("reload failed: ")

    unit.settings("workers = 2")
    done = unit.reload()

    assert done.returncode == 0, done.stderr
    assert unit.manager.wait_for("READY")["STATUS"].endswith(" is serving")
    assert "event=configured" in (said := ended(process)), said
    assert "workers: 1 -> 2" in said, said


@pytest.mark.parametrize("line", ["", "no-log-relay = true"], ids=["shipped", "no relay"])
@pytest.mark.costly
def test_a_failed_reload_of_the_unit_shows_the_end_of_the_traceback(unit: Unit, line: str) -> None:
    """The journal is a socket.  Without the relay the command that shows it is named."""
    unit.settings(line)
    ours, journal = socket.socketpair()
    found = os.fstat(journal.fileno())
    process = unit.start(stderr=journal.fileno(), JOURNAL_STREAM=f"{found.st_dev}:{found.st_ino}")
    journal.close()
    unit.manager.wait_for("READY")

    unit.settings(line, command=(sys.executable, "-c", "raise RuntimeError('no such table')"))
    done = unit.reload()

    assert done.returncode == 3, done
    wanted = "see `journalctl" if line else "RuntimeError: no such table"
    assert wanted in done.stderr
    process.terminate()
    assert process.wait(DEADLINE_S) == 0
    ours.close()


@needs.ROOT
def test_a_start_by_the_unit_as_root_wants_to_be_told_so(unit: Unit) -> None:
    unit.settings(user=None)

    process = unit.start()

    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert 'write user = "NAME" in ' in said, said
    assert f'{unit.config}, or user = "root" if intended' in said, said
    assert list(unit.runtime.iterdir()) == []


@needs.ANOTHER_USER
@pytest.mark.costly
def test_the_unit_needs_nothing_of_its_runtime_folder_but_to_be_there(unit: Unit) -> None:
    """It stays root's: at each ExecReload systemd gives it, with all in it, to the unit's user."""
    # The interpreter is not one that the user `nobody` could run everywhere.
    unit.settings('ready = "after:0.05s"', user="nobody", command=("/bin/sh", "-c", "cat <&3"))
    nobody = pwd.getpwnam("nobody").pw_uid

    process = unit.start()
    unit.manager.wait_for("READY")
    assert Path(f"/proc/{process.pid}").stat().st_uid == nobody
    said = ended(process)

    assert "notice" not in said, said
    assert "notify-socket-abstract" not in said, said
    assert unit.runtime.stat().st_uid == 0
    # What it could not remove does no harm: systemd removes it, unless it starts it again.
    process = unit.start()
    unit.manager.wait_for("READY")
    ended(process)


def test_the_example_is_finite_and_says_who(unit: Unit) -> None:
    shipped = tomllib.loads((UNITS / "example.toml").read_text())

    assert shipped["user"] not in ("", "root")
    assert shipped["max-draining"] > 0
    assert shipped["drain-timeout"] not in (0, "0", "0s")
    unit.settings(command=("/bin/cat",))
    words = ["--check", "--require-user", "--config", str(unit.config)]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_line_of_the_example_that_is_commented_out_is_valid(unit: Unit) -> None:
    unit.settings(command=("{release}/daemon",))
    files = unit.config.parent
    release = files / "releases" / "1"
    (files / "live").mkdir()
    release.mkdir(parents=True)
    (release / "daemon").symlink_to("/bin/cat")
    (files / "live" / "current").symlink_to(release)
    (files / "web.env").touch()
    text = re.sub(r"^#(?=[A-Za-z-]+ = |\[)", "", unit.config.read_text(), flags=re.MULTILINE)
    text = re.sub(r'"/(srv|var/log|var/lib|etc)/[a-z]+/', f'"{files}/', text)

    unit.config.write_text(text)

    assert {"handoff", "ready", "current", "guard", "env-file", "env"} <= tomllib.loads(text).keys()
    assert tomllib.loads(text)["env"]
    words = ["--check", "--config", str(unit.config)]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_two_units_differ_in_the_instance_alone() -> None:
    one, many = settings_of("socketprotector.service"), settings_of("socketprotector@.service")

    assert one.pop("Description") != many.pop("Description")
    # In the journal `default` would say nothing.
    assert one.pop("SyslogIdentifier") == ["socketprotector"]
    assert many.pop("SyslogIdentifier") == ["%i"]
    assert one == {
        name: [value.replace("%i", "default") for value in values] for name, values in many.items()
    }


@pytest.mark.parametrize(
    ("unit", "earlier"),
    [
        ("socketprotector@.service", "socketprotector-exporter.service"),
        ("socketprotector@.service", "socketprotector-page.service"),
        ("socketprotector-exporter.service", "network-online.target"),
        ("socketprotector-page.service", "network-online.target"),
    ],
)
def test_a_shutdown_stops_a_unit_before_what_its_lame_duck_is_heard_by(
    unit: str, earlier: str
) -> None:
    # The other way round than the start.  With a real systemd: tests/vm/test_fleet.py.
    assert earlier in " ".join(settings_of(unit)["After"]).split()


#: As needrestart 3.6 reads a file of conf.d, and asks about each unit.
NEEDRESTART = r"""
my %nrconf = (override_rc => {});
eval do { local (@ARGV, $/) = shift; <> };
die $@ if $@;
foreach my $rc (@ARGV) {
    my $restart = 1;
    foreach my $re (keys %{$nrconf{override_rc}}) {
        next unless $rc =~ /$re/;
        $restart = $nrconf{override_rc}->{$re};
        last;
    }
    print "$rc\n" if $restart;
}
"""


#: systemd-analyze makes it, where it may.
needs_its_folder = needs.unless(needs.IS_ROOT or Path("/run/systemd").is_dir(), "/run/systemd")


@needs.programs("perl")
def test_needrestart_restarts_none_of_the_units() -> None:
    units = ["socketprotector.service", "socketprotector@web.service"]
    script = "socketprotector"  # of init.d
    others = ["socketprotector-exporter.service", "ssh.service", "my-socketprotector.service"]

    done = subprocess.run(
        ["perl", "-we", NEEDRESTART, UNITS / "needrestart.conf", *units, script, *others],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )

    assert done.stdout.split() == others


@needs.programs("systemd-analyze")
@needs_its_folder
@pytest.mark.parametrize(
    "unit",
    [
        "socketprotector.service",
        "socketprotector@.service",
        "socketprotector@.socket",
        "socketprotector-exporter.service",
        "socketprotector-page.service",
    ],
)
def test_systemd_finds_nothing_wrong_with_the_units(unit: str, tmp_path: Path) -> None:
    for name in ("SocketProtector", "socketprotectorctl", "socketprotector-exporter"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    for one in (*UNITS.glob("*.s[eo]*"), *EXPORTERS.glob("*.service")):
        # It looks for the program where systemd would.
        there = re.sub("^(Exec[A-Za-z]+=)", rf"\g<1>{tmp_path}/", one.read_text(), flags=re.M)
        (tmp_path / one.name).write_text(there)

    done = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            "--man=no",
            "--recursive-errors=no",
            tmp_path / unit.replace("@", "@web"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )

    assert done.stdout == ""
    assert done.returncode == 0


#: What docs/security.md says; less is better.
EXPOSURE = 3.0


@needs.programs("systemd-analyze")
@needs_its_folder
@pytest.mark.parametrize(
    "unit",
    ["socketprotector.service", "socketprotector@.service", "socketprotector-page.service"],
)
def test_the_units_are_as_closed_as_the_document_says(unit: str) -> None:
    done = subprocess.run(
        [
            *("systemd-analyze", "security", "--offline=true", "--no-pager"),
            *(f"--threshold={round(EXPOSURE * 10)}", str(shipped(unit))),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    if "Unknown option" in done.stderr or "unrecognized option" in done.stderr:
        needs.skip("systemd-analyze of 250 or newer")

    assert done.returncode == 0, done.stdout + done.stderr
    said = (ROOT / "docs" / "security.md").read_text()
    assert f"scores the shipped units {EXPOSURE:.1f}" in said


@needs.ANOTHER_USER
@pytest.mark.parametrize("options", ["", "--worker-user games"])
@pytest.mark.parametrize("filtered", [False, True], ids=["all calls", "the unit's calls"])
def test_the_capabilities_and_calls_that_the_units_leave_are_enough(
    marked_environment: dict[str, str],
    request: pytest.FixtureRequest,
    options: str,
    filtered: bool,
) -> None:
    """Root without any others binds, makes its files in the user's folder, and starts workers."""
    setpriv = shutil.which("setpriv") or needs.skip("setpriv")
    unit = settings_of("socketprotector@.service")
    [names] = unit["CapabilityBoundingSet"]
    bounds = ",".join(
        ["-all", *(f"+{word.removeprefix('CAP_').lower()}" for word in names.split())]
    )
    manager = Manager(f"@socketprotector-test-{os.urandom(8).hex()}")
    request.addfinalizer(manager.close)
    # Not tmp_path: others than root must get there.
    folder = Path(tempfile.mkdtemp(prefix="socketprotector-"))
    request.addfinalizer(lambda: shutil.rmtree(folder))
    os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)

    process = subprocess.Popen(
        [
            *(under_unit(shipped("socketprotector@.service")) if filtered else ()),
            *(setpriv, f"--bounding-set={bounds}", "--inh-caps=-all", "--no-new-privs"),
            *(*COMMAND, "-f", "--pid-file", str(folder / "pid"), "--user", "nobody"),
            *(*options.split(), "--ready", "after:0.05s", "--chdir", "/"),
            *(f"unix:{folder}/s?user=games", "--", "/bin/sh", "-c", "cat <&3"),
        ],
        env={**os.environ, **marked_environment, "NOTIFY_SOCKET": manager.address},
    )
    try:
        assert manager.wait_for("READY")["STATUS"] == "generation 1 is serving"
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(DEADLINE_S)
    assert status == 0
    assert list(folder.iterdir()) == []
