"""A program that binds its own port, under the default handoff."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from socketprotector.model import known_servers
from tests.own_folder import let_through
from tests.running import DEADLINE_S, FAIR_START_S, Protector
from tests.scenarios.adopting import kill_protector, revived
from tests.scenarios.config_file import File
from tests.scenarios.starting import MINIMAL, Start
from tests.scenarios.tools import Release, worker
from tests.unit.ctl.conftest import run

Command = Callable[..., Protector]

_LISTENS = "import socket, signal; s = socket.create_server(('127.0.0.1', {})); signal.pause()"


def failed(protector: Command, *arguments: str) -> str:
    """Return the reason of a start that failed."""
    daemon = protector(*arguments)
    assert daemon.wait() == 3
    return daemon.log.text()


@pytest.mark.costly
def test_where_its_port_is_ours_the_start_says_what_it_wants(
    protector: Command, free_port: Callable[[], int]
) -> None:
    port = free_port()

    said = failed(protector, f"127.0.0.1:{port}", "--", sys.executable, "-c", _LISTENS.format(port))

    assert (
        "it binds its own address, which is in use; a program that binds its own port, or" in said
    )
    assert "--handoff listener (docs/servers.md)" in said
    assert "after:" not in said


def test_a_reload_to_a_program_that_binds_its_own_port_says_what_it_wants(
    protector: Command, free_port: Callable[[], int], tmp_path: Path
) -> None:
    port, release = free_port(), Release(tmp_path / "release")
    release.becomes(*worker("many"))
    daemon = protector("--log-prefix", f"127.0.0.1:{port}", "--", release.path).ready()
    release.becomes(sys.executable, "-c", _LISTENS.format(port))

    said = run("--name", "release", "reload")

    assert said.status == 3
    assert "it binds its own address, which is in use; a program that binds its own" in said.err
    daemon.stop()


def test_one_that_accepts_on_descriptor_3_is_said_to_need_the_other_handoff(
    protector: Command, tmp_path: Path
) -> None:
    accepts = "import socket; socket.socket(fileno=3).accept()"
    log = tmp_path / "log"

    failed(protector, "--log-file", str(log), "127.0.0.1:0", "--", sys.executable, "-c", accepts)

    assert "or accepts on descriptor 3, needs --handoff listener" in log.read_text()


def test_where_it_listens_elsewhere_the_start_says_where(
    protector: Command, free_port: Callable[[], int]
) -> None:
    port = free_port()
    command = (sys.executable, "-c", _LISTENS.format(port))

    said = failed(protector, "--start-timeout", f"{FAIR_START_S}s", "127.0.0.1:0", "--", *command)

    assert (
        f"it listens on its own socket at 127.0.0.1:{port}; a program that binds its own port"
        in said
    )
    assert "after:" not in said


@pytest.mark.costly
def test_where_its_output_is_ours_to_read_its_own_words_say_so(
    protector: Command, free_port: Callable[[], int], tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "log"
    command = (sys.executable, "-c", _LISTENS.format(port))

    failed(protector, "--log-file", str(log), f"127.0.0.1:{port}", "--", *command)

    assert "it binds its own address, which is in use; a program that" in log.read_text()


@pytest.mark.parametrize("as_module", [False, True])
def test_a_known_server_is_named_with_a_line_to_copy(protector: Command, as_module: bool) -> None:
    uvicorn = Path(sys.executable).with_name("uvicorn")
    command = (sys.executable, "-m", "uvicorn") if as_module else (uvicorn,)
    daemon = protector("--check", "127.0.0.1:0", "--", *command, "app:app")

    assert daemon.wait() == 0
    said = daemon.log.text()
    assert "uvicorn binds its own port; it takes connections from SocketProtector only" in said
    typed = shlex.join(map(str, command))
    assert "start it as: SocketProtector --handoff listener --settle 5s -f http=127.0.0.1:0" in said
    assert f" -- {typed} --fd {{fd:http}} app:app" in said


def test_a_check_names_the_servers_own_limit_beside_ours(
    protector: Command, tmp_path: Path
) -> None:
    gunicorn = Release(tmp_path / "gunicorn")
    gunicorn.becomes("sleep", "1000")
    words = ("--handoff", "listener", "--drain-timeout", "1h", "127.0.0.1:0", "--", gunicorn.path)
    daemon = protector("--check", *words, "--preload", "app")

    assert daemon.wait() == 0
    said = "30s after a reload (--graceful-timeout), before --drain-timeout (1h)"
    assert said in daemon.log.text()


def test_a_start_that_is_doomed_says_so_at_once(start: Start, tmp_path: Path) -> None:
    """The terminal has the operator's own words; the log, which is kept, has none of them."""
    gunicorn = Release(tmp_path / "gunicorn")
    gunicorn.becomes("sleep", "1000")
    words = ("--start-timeout", "1h", "127.0.0.1:0", "--", gunicorn.path, "-b", ":80", "a:secret")

    with start.popen("--log-file", start.log_file, *words) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "client library" in line)
        start.wait_for("event=spawned")  # and is waited for
        process.terminate()
        process.communicate(timeout=DEADLINE_S)

    own = f"--ready notify --log-file {start.log_file} --start-timeout 1h 127.0.0.1:0 -- "
    assert f"{own}{gunicorn.path} --preload a:secret\n" in said
    assert "event=notice" in start.log
    assert f"start it as: SocketProtector --handoff listener {own}" in start.log
    assert f"{gunicorn.path} --preload ... (--check shows it whole)" in start.log
    assert "secret" not in start.log


def test_a_start_that_waits_says_for_what(start: Start) -> None:
    words = ("--start-timeout", "1h", "127.0.0.1:0", "--", "sleep", "1000")
    with start.popen("--log-file", start.log_file, *words) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "waiting: " in line)
        process.terminate()
        process.communicate(timeout=DEADLINE_S)

    assert said.startswith("SocketProtector: waiting: generation 1 starts: 0 of 1 worker ready, ")
    assert said.endswith(" left\n")


def test_one_that_uses_the_client_library_gets_no_advice(
    protector: Command, tmp_path: Path
) -> None:
    gunicorn = Path(sys.executable).with_name("gunicorn")
    (tmp_path / "own.py").write_text("from socketprotector_client.gunicorn import when_ready\n")
    (tmp_path / "other.py").write_text("workers = 2\n")
    for named, told in (("own.py", False), ("other.py", True)):
        words = ("--chdir", str(tmp_path), "--check", "127.0.0.1:0", "--", gunicorn, "-c", named)
        daemon = protector(*words, "app:app")

        assert daemon.wait() == 0
        assert ("binds its own port" in daemon.log.text()) is told


def test_the_log_says_what_takes_a_broken_release_of_a_server_without_readiness_back(
    protector: Command,
) -> None:
    uvicorn = Path(sys.executable).with_name("uvicorn")
    command = ("--", uvicorn, "--fd", "3", "app:app")
    timed = ("--ready", "after:1s")
    for options, told in ((timed, True), ((*timed, "--settle", "5s"), False), ((), False)):
        daemon = protector("--handoff", "listener", *options, "--check", "127.0.0.1:0", *command)

        assert daemon.wait() == 0
        assert ("counts as ready after 1s" in daemon.log.text()) is told


def test_the_log_says_what_a_known_server_that_takes_no_socket_over_lacks(
    protector: Command, tmp_path: Path
) -> None:
    uvicorn = Release(tmp_path / "uvicorn")
    uvicorn.becomes("sleep", "1000")
    options = ("--handoff", "listener", "--ready", "after:1ms", "127.0.0.1:0")
    daemon = protector(*options, "--", uvicorn.path, "app:app").ready()

    told = daemon.log.wait_for("uvicorn was not given the socket")
    assert f"-- {uvicorn.path} --fd {{fd:http}} ... (--check shows it whole)" in told


def test_a_start_says_that_starman_cannot_take_a_unix_socket(
    protector: Command, tmp_path: Path
) -> None:
    starman = Release(tmp_path / "starman")
    starman.becomes("sleep", "1000")
    options = ("--handoff", "listener", "--ready", "after:1ms", "--drain-signal", "QUIT")
    daemon = protector(*options, f"unix:{tmp_path}/s", "--", starman.path, "app.psgi").ready()

    told = daemon.log.wait_for("takes a UNIX socket for a TCP one and dies of its first client")
    assert "0.0.0.0:8000 -- starman" in told


@pytest.mark.costly
def test_a_warning_stays_in_status_until_a_reload_resolves_it(
    protector: Command, tmp_path: Path
) -> None:
    """It outlives an upgrade, and a kill of SocketProtector under its guard."""
    uvicorn, control = Release(tmp_path / "uvicorn"), tmp_path / "ctl"
    uvicorn.becomes("sleep", "1000")
    file = File(tmp_path / "own.toml")
    file.command = [str(uvicorn.path), "app:app"]
    file.listens = ["http=127.0.0.1:0", f"unix:{tmp_path}/s?mode=0755"]
    options = 'handoff = "listener"\nready = "after:1ms"\nsettle = "1ms"'
    file.says(options)
    words = ("--guard", "--control", str(control), "--config", str(file.path))
    daemon = protector(*words).ready()

    def warnings() -> list[str]:
        return [*json.loads(run("--control", control, "status", "--json").out)["warnings"]]

    before = warnings()
    assert ["was not given the socket" in each for each in before].count(True) == 1
    assert [f"{tmp_path}/s: only user" in each for each in before].count(True) == 1
    assert "warning: uvicorn was not given the socket" in run("--control", control, "status").out

    assert run("--control", control, "upgrade").status == 0
    assert warnings() == before
    revived(daemon, kill_protector(daemon))
    assert warnings() == before

    (tmp_path / "s").chmod(0o666)
    let_through(tmp_path)
    file.command = [str(uvicorn.path), "--fd", "{fd:http}", "app:app"]
    file.says(options)
    assert run("--control", control, "reload").status == 0
    assert warnings() == []
    daemon.stop()


_WSGI = """def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "0")])
    return []
"""
_ASGI = """async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})
"""
#: It takes longer to fail than a server without a word is waited for.
_BROKEN = "import time; time.sleep(1.5); raise RuntimeError('no such luck')"


@pytest.mark.parametrize(("name", "app"), [("gunicorn", _WSGI), ("uvicorn", _ASGI)])
@pytest.mark.costly
def test_the_line_to_copy_gives_up_a_release_that_cannot_be_loaded(
    protector: Command, tmp_path: Path, name: str, app: str
) -> None:
    module = tmp_path / "app.py"
    module.write_text(app)
    words = shlex.split(known_servers.line(name).replace(":8000", ":0"))[1:]
    at = words.index("--") + 1
    server = Path(sys.executable).with_name(words[at])
    own = ("--chdir", str(tmp_path), "--env", "PYTHONDONTWRITEBYTECODE=1")
    daemon = protector(*own, *words[:at], server, *words[at + 1 :]).ready()
    assert _answers(daemon)

    module.write_text(_BROKEN)
    mark = daemon.signal(signal.SIGHUP)

    failed = daemon.log.wait_for("event=reload-failed", after=mark)
    assert "generation=2" in failed
    assert "its last words:" not in failed  # they are in last_words=
    assert _answers(daemon)


def _answers(daemon: Protector) -> bool:
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=FAIR_START_S) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return client.recv(100).startswith(b"HTTP/1.")


@pytest.mark.costly
def test_one_that_is_thought_ready_and_takes_no_client_is_reported(protector: Command) -> None:
    command = ("--name", "web", "--ready", "after:1ms", "127.0.0.1:0", "--", "sleep", "1000")
    daemon = protector(*command).ready()
    with socket.create_connection(("127.0.0.1", daemon.port)):
        line = daemon.log.wait_for("event=queue-stalled")

        assert "generation=1 waiting=1" in line
        assert 'reason="no worker has accepted a connection yet"' in line
        assert "--handoff listener (docs/servers.md)" in line
        [generation] = json.loads(run("--name", "web", "status", "--json").out)["generations"]
        assert generation["oldest_waiting_s"] >= 5
        assert "no worker has taken a waiting client" in run("--name", "web", "status").out
        assert "stuck" in run("list").out


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_one_that_was_handed_the_socket_and_accepts_no_client_is_reported(
    protector: Command, tmp_path: Path, kind: str
) -> None:
    address = f"unix:{tmp_path}/s" if kind == "unix" else "127.0.0.1:0"
    elsewhere = "import socket, signal; s = socket.create_server(('127.0.0.1', 0)); signal.pause()"
    options = ("--name", "web", "--handoff", "listener", "--ready", "after:1ms")
    daemon = protector(*options, address, "--", sys.executable, "-c", elsewhere).ready()
    where = address.removeprefix("unix:") if kind == "unix" else ("127.0.0.1", daemon.port)
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as client:
        client.connect(where)
        line = daemon.log.wait_for("event=queue-stalled")

        assert f"generation=1 waiting=1 listen={daemon.addresses[0]}" in line
        assert 'reason="no worker has accepted a connection yet"' in line
        assert "it listens on its own socket at 127.0.0.1:" in line
        assert "the server must accept on the inherited socket" in line
        assert "a wrapper must exec the server" in line
        [generation] = json.loads(run("--name", "web", "status", "--json").out)["generations"]
        assert generation["oldest_waiting_s"] >= 5
        assert "no worker has taken a waiting client" in run("--name", "web", "status").out
        assert "stuck" in run("list").out


@pytest.mark.costly
def test_one_of_two_sockets_that_a_server_ignores_is_reported(protector: Command) -> None:
    options = ("--handoff", "listener", "--ready", "after:1ms", "127.0.0.1:0", "127.0.0.1:0")
    first = "import socket; s = socket.socket(fileno=3)\nwhile True: s.accept()[0].close()"
    daemon = protector(*options, "--", sys.executable, "-c", first).ready()
    ports = [int(each.rpartition(":")[2]) for each in daemon.addresses]
    with socket.create_connection(("127.0.0.1", ports[0])) as served:
        assert served.recv(1) == b""
    with socket.create_connection(("127.0.0.1", ports[1])):
        line = daemon.log.wait_for("event=queue-stalled")

    assert f"listen={daemon.addresses[1]} " in line


@pytest.mark.costly
def test_one_that_has_spoken_with_us_before_is_not_taken_for_one(
    protector: Command, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*MINIMAL)
    daemon = protector("127.0.0.1:0", "--", release.path).ready()

    release.becomes("false")
    mark = daemon.signal(signal.SIGHUP)

    assert "--handoff" not in daemon.log.wait_for("event=reload-failed", after=mark)
