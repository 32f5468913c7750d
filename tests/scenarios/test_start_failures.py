"""A start that fails: the exit status, one clear line with what to do, and nothing left behind."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from socketprotector.launch import port_owner
from tests import needs
from tests.procfs import children_of, name_of
from tests.running import MARK, Ended, Protector, marked, wait_gone
from tests.scenarios.starting import MINIMAL, Start, start_of
from tests.scenarios.tools import spawned, worker

needs_root = needs.ANOTHER_USER


def refused(ended: Ended, status: int, *said: str) -> None:
    """It ended with this status and one line in which all of this is said."""
    assert ended.status == status, ended
    assert len(ended.lines) == 1, ended
    assert ended.err.startswith("SocketProtector: ")
    assert [words for words in said if not re.search(words, ended.err)] == [], ended


@pytest.fixture(params=["detached", "foreground"])
def mode(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return ("-f",) if request.param == "foreground" else ()


# -- before anything is started ------------------------------------------------


def test_a_port_in_use_is_refused_with_the_name_of_the_process_that_has_it(
    start: Start, mode: tuple[str, ...]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = start(*mode, f"unix:{start.folder}/s", f"127.0.0.1:{port}", "--", *MINIMAL)

    who = rf"process {os.getpid()} \(.+\) has it: stop that program, or choose another address"
    refused(ended, 111, rf"cannot listen on 127.0.0.1:{port} .*Address already in use", who)
    assert start.left() == []


def test_a_port_that_a_worker_has_too_is_refused_with_the_name_of_its_protector(
    protector: Callable[..., Protector],
) -> None:
    """A worker that is stopped by hand is replaced, and the replacement has the port."""
    command = ("--", *worker("master", "v1"))
    daemon = protector("--handoff", "listener", "--ready", "notify", "127.0.0.1:0", *command)
    daemon.ready()
    expected = f"process {daemon.pid} (SocketProtector) has it: if that is this instance, use "

    assert port_owner.of_port("127.0.0.1", daemon.port).startswith(expected)
    daemon.reload()  # a worker of this generation has the address's other socket
    assert port_owner.of_port("127.0.0.1", daemon.port).startswith(expected)


@pytest.mark.parametrize("listen", ["tcp", "unix"])
def test_an_address_that_the_workers_of_a_killed_protector_keep_is_refused_with_their_master(
    protector: Callable[..., Protector], tmp_path: Path, listen: str
) -> None:
    """The master replaces a child that is ended."""
    path = str(tmp_path / "s")
    address = f"unix:{path}" if listen == "unix" else "127.0.0.1:0"
    command = ("--", *worker("master", "v1"))
    daemon = protector("--handoff", "listener", "--ready", "notify", address, *command).ready()
    [master] = spawned(daemon)

    os.kill(daemon.pid, signal.SIGKILL)
    assert wait_gone([daemon.pid]) == []

    name = name_of(master)
    who = f"process {master} ({name}) has it: if a killed SocketProtector left this worker, "
    said = (
        port_owner.of_path(path)
        if listen == "unix"
        else port_owner.of_port("127.0.0.1", daemon.port)
    )
    assert said.startswith(who)
    children = children_of(master)
    os.kill(master, signal.SIGTERM)
    assert wait_gone([master, *children]) == []


def test_the_wildcard_is_in_use_where_one_address_is(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = start(str(taken.getsockname()[1]), "--", *MINIMAL)

    refused(ended, 111, "Address already in use", f"process {os.getpid()} ")
    assert start.left() == []


def test_an_outgoing_connection_has_its_port(start: Start) -> None:
    """`ss -l` does not show that one."""
    here = ("127.0.0.1", 0)
    with (
        socket.create_server(here) as server,
        socket.create_connection(server.getsockname(), source_address=here) as client,
    ):
        ended = start(str(client.getsockname()[1]), "--", *MINIMAL)

    refused(ended, 111, "Address already in use", f"process {os.getpid()} ")


def test_an_outgoing_connection_of_a_worker_is_no_reason_to_stop_its_protector(
    protector: Callable[..., Protector],
) -> None:
    code = """if True:
        import signal, socket, sys
        here = "127.0.0.1", 0
        kept = socket.create_connection(("127.0.0.1", int(sys.argv[1])), source_address=here)
        signal.pause()
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = (sys.executable, "-I", "-c", code, str(server.getsockname()[1]))
        mode = ("--handoff", "listener", "--ready", "after:10ms")
        daemon = protector(*mode, "127.0.0.1:0", "--", *command).ready()
        accepted, (_, port) = server.accept()
        with accepted:
            expected = f"process {spawned(daemon)[0]} (python"
            assert port_owner.of_port("127.0.0.1", port).startswith(expected)
        daemon.stop()


@needs_root
def test_a_privileged_port_without_the_right_is_refused(start: Start) -> None:
    if Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text().strip() == "0":
        needs.skip("a port that is only for root")
    if shutil.which("setpriv") is None:
        needs.skip("setpriv")

    ended = start(
        *("127.0.0.1:81", "--", *MINIMAL), before=("setpriv", "--bounding-set=-net_bind_service")
    )

    refused(ended, 111, "Permission denied", "needs root or CAP_NET_BIND_SERVICE", "--user")
    assert start.left() == []


def test_a_command_that_is_not_there_is_refused(start: Start, mode: tuple[str, ...]) -> None:
    ended = start(*mode, "127.0.0.1:0", "--", "./no-such-daemon")

    refused(ended, 2, "cannot run .*/no-such-daemon: No such file", "check the path")
    assert start.left() == []


@needs_root
@pytest.mark.parametrize("option", ["--pid-file", "--log-file"])
def test_a_file_that_may_not_be_written_is_refused(start: Start, option: str) -> None:
    if shutil.which("setpriv") is None:
        needs.skip("setpriv")
    folder = start.folder / "closed.sh"
    folder.mkdir(mode=0o555)
    rights = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")

    ended = start(option, "closed.sh/file", "127.0.0.1:0", "--", *MINIMAL, before=rights)

    refused(ended, 111, "closed.sh/file: Permission denied", "and its permissions")
    assert start.left() == []


@needs_root
def test_a_user_that_may_not_be_taken_on_is_refused(start: Start, mode: tuple[str, ...]) -> None:
    if shutil.which("setpriv") is None:
        needs.skip("setpriv")

    ended = start(
        *(*mode, "--user", "nobody", f"unix:{start.folder}/s", "--", *MINIMAL),
        before=("setpriv", "--bounding-set=-setuid,-setgid"),
    )

    assert ended.status == 111
    assert "SocketProtector: cannot become nobody: Operation not permitted; " in ended.err
    assert start.left() == []


@needs_root
@pytest.mark.parametrize("lacks", ["kill", "setpcap", "chown"])
def test_a_capability_that_another_user_needs_is_named(start: Start, lacks: str) -> None:
    if shutil.which("setpriv") is None:
        needs.skip("setpriv")
    users = ("--user", "nobody", "--worker-user", "games", "--log-file", "log")

    ended = start(
        *(*users, "--chdir", "/", "127.0.0.1:0", "--", "/bin/sleep", "1000"),
        before=("setpriv", f"--bounding-set=-{lacks}"),
    )

    assert ended.status == 111
    assert f"CAP_{lacks.upper()}" in ended.lines[-1]
    assert start.left() == []


# -- when workers are started --------------------------------------------------


@pytest.mark.parametrize(
    "where", ["log file", "log file in the foreground", "relay", "stderr", "pipe"]
)
def test_a_worker_that_exits_at_once_is_reported_with_its_last_words(
    start: Start, where: str
) -> None:
    words: list[str | Path] = [f"unix:{start.folder}/s", "--", *worker("dies_before_ready")]
    stderr: int = subprocess.PIPE
    if "log file" in where:
        words[:0] = ["--log-file", start.log_file]
    if where in ("log file in the foreground", "stderr", "pipe"):
        words.insert(0, "-f")
    if where == "stderr":
        stderr = os.open(start.folder / "stderr.sh", os.O_RDWR | os.O_CREAT)
        ended = start(*words, stderr=stderr)
        os.close(stderr)
        ended.err = (start.folder / "stderr.sh").read_text()
    else:
        ended = start(*words)

    assert ended.status == 3, ended
    expected = (
        r"^SocketProtector: \S+ exited with status 1 before it was ready; "
        "its last words:\ncannot read the configuration: no such luck\n\\Z"
    )
    assert re.search(expected, ended.err, re.MULTILINE), ended
    assert start.left() == []


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("pipe", "stderr of SocketProtector -f; remove --no-log-relay to see"),
        ("file", "stderr of SocketProtector -f; remove --no-log-relay and set --log-prefix to see"),
        (
            "terminal",
            "the terminal of SocketProtector -f; remove --no-log-relay and set --log-prefix to see",
        ),
    ],
)
def test_a_start_without_the_log_relay_says_where_the_workers_output_is(
    start: Start, stderr: str, words: str
) -> None:
    if stderr == "terminal":
        ours, theirs = pty.openpty()
    else:
        ours, theirs = os.pipe()
    if stderr == "file":
        os.close(theirs)
        theirs = os.open(start.folder / "stderr.sh", os.O_WRONLY | os.O_CREAT)

    ended = start("-f", "--no-log-relay", "unix:s", "--", "sh", "-c", "exit 1", stderr=theirs)

    os.close(theirs)
    written = (start.folder / "stderr.sh").read_text() if stderr == "file" else _read_all(ours)
    os.close(ours)
    assert ended.status == 3
    assert "exited with status 1 before it was ready; " in written
    assert f"; see {words} the output here" in written


def _read_all(fd: int) -> str:
    data = b""
    with suppress(OSError):  # a terminal without another end
        while part := os.read(fd, 65536):
            data += part
    return data.decode()


def test_last_words_may_have_the_form_of_our_log(start: Start) -> None:
    line = '{"time": "12:00", "level": "error", "event": "no database"}'

    ended = start("127.0.0.1:0", "--", "sh", "-c", f"echo '{line}' >&2; exit 3")

    assert line in ended.err


def test_control_characters_in_last_words_are_escaped(start: Start) -> None:
    ended = start("127.0.0.1:0", "--", "sh", "-c", r"printf 'a\033[31mb\n' >&2; exit 3")

    assert r"a\x1b[31mb" in ended.err
    assert "\x1b" not in ended.err


@pytest.mark.costly
def test_a_worker_that_is_killed_at_once_is_reported(start: Start) -> None:
    ended = start("127.0.0.1:0", "--", "sh", "-c", "kill -KILL $$")

    refused(ended, 3, "sh was killed by SIGKILL before it was ready")
    assert start.left() == []


@pytest.mark.parametrize("kind", ["no interpreter", "no program"])
def test_a_command_that_the_system_cannot_execute_is_reported(start: Start, kind: str) -> None:
    """Before anything is started where it is known; the kernel itself may know other formats."""
    content = "#!/no/such/interpreter\n" if kind == "no interpreter" else "\x7fELF\0\0\0\0"
    daemon = start.folder / "daemon.sh"
    daemon.write_text(content)
    daemon.chmod(0o755)

    ended = start("127.0.0.1:0", "--", "./daemon.sh")

    if kind == "no interpreter":
        said = "the interpreter in its first line is missing"
        refused(ended, 2, f"cannot run .*/daemon.sh: {said}; check the path")
    else:
        refused(ended, 3, "cannot start: .*/daemon.sh: .*Exec format error")
    assert start.left() == []


@pytest.mark.parametrize("name", ["never_ready", "has_children_never_ready"])
def test_a_worker_that_is_never_ready_is_reported_with_what_ready_means(
    start: Start, name: str, mode: tuple[str, ...]
) -> None:
    command = worker("never_ready")
    if name != "never_ready":
        command = ("sh", "-c", "sleep 1000 & sleep 1000 & wait")

    ended = start(*mode, "--start-timeout", "300ms", f"unix:{start.folder}/s", "--", *command)

    assert ended.status == 3, ended
    last = ended.lines[-1]
    assert last.startswith("SocketProtector: not ready within 300ms (--start-timeout); ")
    for hint in ("READY=1", "socketprotector_client"):
        assert hint in last
    assert "after:" not in last
    assert start.left() == []


@pytest.mark.parametrize(
    ("ready", "hint"),
    [
        ("check:echo gone; exit 1", "echo: exited with status 1: gone; the command of --ready"),
        ("ack", "no worker sent einhorn's ACK"),
        ("fd:3", "no worker wrote a line to the descriptor of --ready fd:N"),
        ("after:30s", "--ready after: is longer than --start-timeout"),
    ],
)
def test_what_is_said_of_one_that_is_never_ready_speaks_of_what_was_to_say_so(
    start: Start, mode: tuple[str, ...], ready: str, hint: str
) -> None:
    # A check must end in this time, too.
    limit = "3s" if ready.startswith("check:") else "300ms"
    timed = ("--ready", ready, "--start-timeout", limit, f"unix:{start.folder}/s")

    ended = start(*mode, *timed, "--", *worker("never_ready"))

    assert ended.status == 3, ended
    assert re.search(rf"not ready within {limit} \(--start-timeout\); {hint}", ended.lines[-1])
    assert "READY=1" not in ended.lines[-1]
    assert start.left() == []


def test_a_worker_that_is_never_ready_and_deaf_is_killed(start: Start) -> None:
    command = ("sh", "-c", "trap '' TERM; sleep 1000; sleep 1000")

    ended = start(
        *("--start-timeout", "100ms", "--kill-timeout", "100ms", "127.0.0.1:0", "--", *command)
    )

    refused(ended, 3, "not ready within 100ms")
    assert start.left() == []


def test_a_worker_that_detaches_itself_is_reported_and_ended(
    start: Start, mode: tuple[str, ...]
) -> None:
    ended = start(
        *mode,
        *("--kill-timeout", "100ms", f"unix:{start.folder}/s", "--", *worker("detaches_itself")),
    )

    assert ended.status == 3
    last = ended.lines[-1]
    assert "exited with status 0 before it was ready" in last
    assert "does it detach? make it stay in the foreground" in last
    assert "use --handoff stdio" in last
    assert start.left() == []


def test_one_of_several_workers_that_fails_fails_the_start(start: Start) -> None:
    command = ("sh", "-c", '[ "$SOCKETPROTECTOR_WORKER" = 0 ] && exec "$@"; exit 9', "-", *MINIMAL)

    ended = start("--workers", "3", "127.0.0.1:0", "--", *command)

    refused(ended, 3, "sh exited with status 9 before it was ready")
    assert start.left() == []


def test_a_start_is_tried_as_often_as_asked(start: Start) -> None:
    tries = start.folder / "tries.sh"

    ended = start(
        *("--start-tries", "2", "127.0.0.1:0", "--"),
        *("sh", "-c", 'echo x >> "$0"; exit 1', str(tries)),
    )

    assert ended.status == 3
    assert tries.read_text() == "x\nx\n"


@pytest.mark.costly
def test_a_worker_that_starts_at_the_second_try_is_good_enough(start: Start) -> None:
    tried = start.folder / "tried.sh"
    command = ("sh", "-c", '[ -e "$0" ] && exec "$@"; : > "$0"; exit 1', str(tried), *MINIMAL)

    start.up("127.0.0.1:0", "--", *command)

    assert "event=retrying" in start.log
    start.stop()


def test_the_command_returns_only_when_the_first_generation_is_ready(start: Start) -> None:
    gate = start.folder / "gate.sh"
    os.mkfifo(gate)
    command = worker("ready_at_gate", gate)

    with start_of(start, "--log-file", start.log_file, "127.0.0.1:0", "--", *command) as process:
        # The worker has the gate open to read it: so it lives, and READY was not said.
        held = os.open(gate, os.O_WRONLY)
        assert process.poll() is None
        assert start.pid in marked(start.environment[MARK])
        os.close(held)
        assert process.wait() == 0

    assert "event=ready" in start.log
    start.stop(signal.SIGINT)
