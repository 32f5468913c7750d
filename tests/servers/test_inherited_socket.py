"""The programs of docs/inherited-socket.md, built as the page says and reloaded under load."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.pages import page
from tests.procfs import is_accepted
from tests.rounds import rounds
from tests.running import ROOT, Protector, eventually
from tests.scenarios.tools import spawned
from tests.servers.catalogue import PAUSE_S
from tests.unit.ctl.conftest import run
from tests.web import Connection, Traffic

Start = Callable[..., Protector]

PAGE = ROOT / "docs" / "inherited-socket.md"
BLOCKS = page.blocks(PAGE)
SOURCES = {block.file: block.text for block in BLOCKS if block.file}
#: By the compiler, or what runs the program: the words of both commands of the page.
COMMANDS = {
    block.commands[0].split()[0]: [shlex.split(each) for each in block.commands]
    for block in BLOCKS
    if block.is_run and "reload" not in block.text
}
#: The commands that build a Go program which exits.
BROKEN = next(block.text for block in BLOCKS if block.is_run and "log.Fatal" in block.text)
#: In Rust, a UNIX socket has types of its own.
FOR_UNIX = {"std::net": "std::os::unix::net", "Tcp": "Unix"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("language", ["go", "rustc", "node"]),
]


@pytest.fixture
def command(tmp_path: Path, language: str, request: pytest.FixtureRequest) -> list[str]:
    """Build a program; return the words that the page starts it with, and where it listens."""
    if shutil.which(language) is None:
        needs.skip(language)
    at = request.getfixturevalue("at") if "at" in request.fixturenames else "tcp"
    build, start = COMMANDS[language][0], [*COMMANDS[language][1]]
    source = build[-1]
    # An old program need not live so long here.
    text = SOURCES[source].replace("3 * time.Second", "time.Second / 5")
    if at == "unix" and language == "rustc":
        for tcp, unix in FOR_UNIX.items():
            text = text.replace(tcp, unix)
    (tmp_path / source).write_text(text)
    subprocess.run(build, cwd=tmp_path, check=True)
    address = f"unix:{tmp_path / 'web.sock'}" if at == "unix" else "127.0.0.1:0"
    log = start.index("--log-file")
    del start[log : log + 2]  # the tests read the log from stdout
    listen = start.index("127.0.0.1:8080")
    start[listen] = address
    server = [word.replace("./", f"{tmp_path}/") for word in start[listen:]]
    return [*start[1:listen], "--chdir", str(tmp_path), *server]


@pytest.mark.parametrize("at", ["tcp", "unix"])
def test_no_request_fails_at_reloads(
    protector: Start, tmp_path: Path, command: list[str], at: str
) -> None:
    daemon = protector(*command).ready()
    address = ("127.0.0.1", daemon.port) if at == "tcp" else str(tmp_path / "web.sock")

    with Traffic(address, pause_s=PAUSE_S) as traffic:
        traffic.wait_for(spawned(daemon)[-1])
        for _ in range(rounds(2, 20)):
            daemon.reload()
            traffic.wait_for(spawned(daemon)[-1])
    daemon.stop()

    assert not traffic.seen.failures


@pytest.mark.costly
def test_a_reload_that_fails_is_shown_as_on_the_page(
    protector: Start, tmp_path: Path, command: list[str], language: str
) -> None:
    daemon = protector("--log-prefix", *command).ready()
    daemon.reload()
    if language == "go":
        build = BROKEN.rpartition("socketprotectorctl")[0]
        subprocess.run(["sh", "-ec", build], cwd=tmp_path, check=True)
    elif language == "node":
        text = "console.error('cannot find the database')\nprocess.exit(1)\n"
        (tmp_path / "web.js").write_text(text)
    else:
        (tmp_path / "web").unlink()
        (tmp_path / "web").write_text("#!/bin/sh\necho cannot find the database\nexit 1\n")
        (tmp_path / "web").chmod(0o755)

    ended = run("--name", "web", "reload")

    assert ended.status == 3
    [shown] = [each.text for each in BLOCKS if each.is_text]
    for wanted in shown.strip().split("\n"):
        assert any(page.is_like(wanted.strip(), line) for line in ended.err.split("\n")), ended
    daemon.stop()


def test_a_request_in_progress_at_the_signal_is_answered(
    protector: Start, command: list[str]
) -> None:
    daemon = protector(*command).ready()
    with Connection(("127.0.0.1", daemon.port)) as client:
        client.write(b"GET / HTTP/1.1\r\n")
        eventually(lambda: is_accepted(daemon.port, client.port), "the connection accepted")
        daemon.reload()
        daemon.log.wait_for(r"event=signalled\b.* signal=TERM")
        client.write(b"Host: x\r\nConnection: close\r\n\r\n")

        assert client.answer() == spawned(daemon)[0]
    daemon.log.wait_for(r"event=exited generation=1\b.*exited with status 0")
    daemon.stop()
