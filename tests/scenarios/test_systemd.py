"""What is said to systemd, heard on a notify socket of the test's own; and the shipped units."""

from __future__ import annotations

import os
import pwd
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from socketprotector.notify import Outbox, Systemd, parse
from tests.running import (
    COMMAND,
    DEADLINE_S,
    ROOT,
    WORKERS,
    Protector,
    ask,
    eventually,
    exchange,
    wait_gone,
)
from tests.scenarios.adopting import Installation, at_rest
from tests.scenarios.tools import Gate

UNITS = ROOT / "init.d"
ECHO = (sys.executable, str(WORKERS / "echo.py"))


class Manager:
    """Hears what a service says, as the service manager does, and remembers who said it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(DEADLINE_S)
        self.sender = 0

    def hear(self) -> dict[str, str]:
        """The next message that is not about the descriptor store (test_store.py)."""
        while True:
            data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(12))
            [credentials] = [c for _, kind, c in ancillary if kind == socket.SCM_CREDENTIALS]
            self.sender = struct.unpack("3i", credentials)[0]
            fields = parse(data)
            print(f"{time.monotonic():.3f} from {self.sender}: {fields}")
            if "FDNAME" not in fields:
                return fields

    def wait_for(self, name: str) -> dict[str, str]:
        """The next message with NAME=1, past any others."""
        while (fields := self.hear()).get(name) != "1":
            pass
        return fields

    def rest(self) -> list[dict[str, str]]:
        """What has been said and not been heard yet."""
        heard = []
        self.socket.setblocking(False)
        try:
            while True:
                heard.append(self.hear())
        except BlockingIOError:
            return heard
        finally:
            self.socket.settimeout(DEADLINE_S)

    def fill(self) -> int:
        """Have others say so much that nothing more goes in; return how many messages."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            said = 0
            try:
                while True:
                    other.sendto(b"STATUS=noise", self.socket.getsockname())
                    said += 1
            except BlockingIOError:
                return said

    def close(self) -> None:
        self.socket.close()
        if not self.address.startswith("@"):
            Path(self.address).unlink(missing_ok=True)


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
        "STATUS": "generation 1 serves",
    }
    assert each_manager.sender == daemon.pid
    daemon.stop()


def test_a_reload_is_told_with_its_time_and_then_ready_again(
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
    assert manager.hear() == {"READY": "1", "STATUS": "generation 2 serves"}
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


def test_a_stop_is_told_with_the_time_it_may_need(
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


def test_a_stop_does_not_wait_for_a_full_notify_socket(
    service: Callable[..., Protector], manager: Manager
) -> None:
    daemon = service()
    manager.wait_for("READY")
    manager.fill()

    daemon.stop()


@pytest.mark.parametrize("reads_on", [True, False])
def test_an_upgrade_waits_for_a_full_notify_socket_but_not_for_ever(
    manager: Manager, installation: Installation, tmp_path: Path, reads_on: bool
) -> None:
    gate = Gate(tmp_path / "gate")
    if not reads_on:
        installation.change("one", "supervisor", r"_BEHIND_S = .*", "_BEHIND_S = 3.0")
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
        assert "version=2.0.0" in daemon.log.wait_for("event=adopted")
    else:
        line = daemon.log.wait_for("event=upgrade-failed")
        assert "has not read on for 3 s" in line
        mark = daemon.signal(signal.SIGUSR2)
        line = daemon.log.wait_for("event=upgrade-failed", after=mark)
        assert "who keeps the descriptors is behind" in line
        manager.rest()
    assert daemon.log.count("event=upgrade-waits") == 1
    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.stop()


def test_a_notify_socket_that_is_gone_neither_blocks_nor_kills(
    service: Callable[..., Protector], manager: Manager
) -> None:
    daemon = service(WATCHDOG_USEC="1000")
    manager.wait_for("READY")
    manager.close()

    daemon.reload()
    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.stop()


@pytest.mark.parametrize("address", ["@socketprotector-nobody-there", "/", "x" * 300, "vsock:2:9"])
def test_a_notify_socket_that_was_never_there_neither_blocks_nor_kills(
    protector: Callable[..., Protector], address: str
) -> None:
    daemon = protector("127.0.0.1:0", "--", *ECHO, NOTIFY_SOCKET=address).ready()

    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    daemon.stop()


def test_when_it_detaches_it_says_who_the_main_process_is_and_feeds_the_watchdog(
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


def test_workers_get_neither_the_managers_socket_nor_its_watchdog(
    service: Callable[..., Protector], manager: Manager
) -> None:
    daemon = service(WATCHDOG_USEC="30000000")
    manager.wait_for("READY")

    [worker] = daemon.worker_pids()

    environment = Path(f"/proc/{worker}/environ").read_bytes().decode().split("\0")
    assert not [line for line in environment if line.startswith("WATCHDOG_")]
    [address] = [line for line in environment if line.startswith("NOTIFY_SOCKET=")]
    assert address != f"NOTIFY_SOCKET={manager.address}"
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
    with socket.create_connection(("127.0.0.1", daemon.port), DEADLINE_S) as held:
        first = exchange(held, "mine")
        [worker] = daemon.worker_pids()

        daemon.process.kill()
        daemon.process.wait(DEADLINE_S)

        assert exchange(held, "mine") == first == f"[{worker}] mine"
    assert wait_gone([worker]) == []


def settings_of(unit: str) -> dict[str, list[str]]:
    """A unit's settings, each with its values in order."""
    text = (UNITS / unit).read_text().replace("\\\n", "")
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def expand(line: str, variables: dict[str, str]) -> list[str]:
    """A command line as systemd makes it of a unit's: $WORD is several words, ${WORD} is one."""
    words = []
    for word in shlex.split(line):
        if word.startswith("$") and word[1:].isidentifier():
            words.extend(shlex.split(variables.get(word[1:], "")))
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda m: variables.get(m[1], ""), word))
    return words


def test_the_units_command_lines_start_and_reload(
    manager: Manager, marked_environment: dict[str, str], tmp_path: Path
) -> None:
    unit = settings_of("socketprotector@.service")
    assert unit["Type"] == ["notify"]
    runtime = f"/run/{unit['RuntimeDirectory'][0]}"
    [start] = unit["ExecStart"]
    assert runtime in start
    user = unit["Environment"][0].removeprefix("SOCKETPROTECTOR_USER=")
    variables = {
        "SOCKETPROTECTOR_USER": user,
        "SOCKETPROTECTOR_LISTEN": f"127.0.0.1:0 unix:@socketprotector-{os.urandom(8).hex()}",
        "SOCKETPROTECTOR_OPTIONS": "--workers 2",
        "SOCKETPROTECTOR_COMMAND": shlex.join(ECHO),
    }
    program, *words = expand(start.replace(runtime, str(tmp_path)).replace("%i", "web"), variables)
    assert program == "SocketProtector"
    if os.geteuid() != 0:
        at = words.index("--user")  # systemd would be root
        del words[at : at + 2]

    process = subprocess.Popen(
        [*COMMAND, *words],
        env={**os.environ, **variables, **marked_environment, "NOTIFY_SOCKET": manager.address},
    )
    ready = manager.wait_for("READY")
    assert ready["MAINPID"] == str(process.pid) == (tmp_path / "pid").read_text().strip()

    [reload] = unit["ExecReload"]
    program, *words = expand(reload.replace(runtime, str(tmp_path)), {})
    assert program == "socketprotectorctl"
    done = subprocess.run(
        [sys.executable, "-m", "socketprotector.ctl", *words],
        env={**os.environ, **marked_environment},
        check=True,
    )
    assert done.returncode == 0
    manager.wait_for("RELOADING")
    assert manager.wait_for("READY")["STATUS"] == "generation 2 serves"

    process.terminate()
    manager.wait_for("STOPPING")
    assert process.wait(DEADLINE_S) == 0
    assert list(tmp_path.iterdir()) == [Path(manager.address)]


def test_the_two_units_differ_in_the_instance_alone() -> None:
    one, many = settings_of("socketprotector.service"), settings_of("socketprotector@.service")

    assert one.pop("EnvironmentFile") == ["/etc/default/socketprotector"]
    assert many.pop("EnvironmentFile") == ["/etc/default/socketprotector.d/%i"]
    assert one.pop("Description") != many.pop("Description")
    assert one == {
        name: [value.replace("%i", "default") for value in values] for name, values in many.items()
    }


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="NOT CHECKED: the units, by systemd-analyze verify, which is not installed",
)
@pytest.mark.parametrize(
    "unit",
    ["socketprotector.service", "socketprotector@.service", "socketprotector-exporter.service"],
)
def test_systemd_finds_nothing_wrong_with_the_units(unit: str, tmp_path: Path) -> None:
    for name in ("SocketProtector", "socketprotectorctl", "socketprotector-exporter"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    text = (UNITS / unit).read_text()
    # It looks for the program where systemd would.
    for line in ("ExecStart=", "ExecReload="):
        text = text.replace(line, f"{line}{tmp_path}/")
    (tmp_path / unit).write_text(text)

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

    about_ours = [line for line in done.stdout.splitlines() if "socketprotector" in line]
    assert about_ours == []
    assert done.returncode == 0, done.stdout


#: What docs/security.md says; less is better.
EXPOSURE = 3.0


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="NOT CHECKED: the units' exposure, by systemd-analyze security, which is not installed",
)
@pytest.mark.parametrize("unit", ["socketprotector.service", "socketprotector@.service"])
def test_the_units_are_as_closed_as_the_document_says(unit: str) -> None:
    done = subprocess.run(
        [
            *("systemd-analyze", "security", "--offline=true", "--no-pager"),
            *(f"--threshold={round(EXPOSURE * 10)}", str(UNITS / unit)),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    if "Unknown option" in done.stderr or "unrecognized option" in done.stderr:
        pytest.skip("NOT CHECKED: the units' exposure; this systemd-analyze is older than 250")

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"scores {EXPOSURE:.1f}" in (ROOT / "docs" / "security.md").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: the unit's capabilities; needs root")
@pytest.mark.parametrize("options", ["", "--worker-user games"])
def test_the_capabilities_that_the_units_leave_are_enough(
    marked_environment: dict[str, str], request: pytest.FixtureRequest, options: str
) -> None:
    """Root without any others binds, makes its files in the user's folder, and starts workers."""
    if shutil.which("setpriv") is None:
        pytest.skip("NOT CHECKED: the unit's capabilities; setpriv(1) is not installed")
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
            *("setpriv", f"--bounding-set={bounds}", "--inh-caps=-all", "--no-new-privs"),
            *(*COMMAND, "-f", "--pid-file", str(folder / "pid"), "--user", "nobody"),
            *(*options.split(), "--ready", "after:0.05s", "--chdir", "/"),
            *(f"unix:{folder}/s?user=games", "--", "/bin/sh", "-c", "cat <&3"),
        ],
        env={**os.environ, **marked_environment, "NOTIFY_SOCKET": manager.address},
    )
    try:
        assert manager.wait_for("READY")["STATUS"] == "generation 1 serves"
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(DEADLINE_S)
    assert status == 0
    assert list(folder.iterdir()) == []
