"""Deploys of real servers under load: a venv for each release, a library worker, node and Go."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.pages import page
from tests.procfs import environment_of
from tests.running import ROOT, eventually
from tests.scenarios.operating import Operated, Operating
from tests.scenarios.releases import Releases, ctl, deployed, saved
from tests.servers.catalogue import PAUSE_S
from tests.web import Traffic

pytestmark = pytest.mark.slow

WSGI = """
import os
def app(environ, start_response):
    body = b"%d" % os.getpid()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""
ASGI = """
import os
async def app(scope, receive, send):
    if scope["type"] == "http":
        body = b"%d" % os.getpid()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
"""
LIBRARY = """
import os
from socketprotector_client import serve
def handle(connection, address):
    connection.recv(4096)
    body = b"%d" % os.getpid()
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
serve(handle)
"""
SOURCES = {
    block.file: block.text
    for block in page.blocks(ROOT / "docs" / "inherited-socket.md")
    if block.file
}
LISTENER = ("--handoff", "listener")


def of_program(name: str) -> str:
    """Find a program that a release is built with, or skip the test."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        needs.skip(name)
    assert found is not None
    return found


def venv(folder: Path, program: str) -> None:
    """Make a virtual environment with the packages of this one, and a program of it."""
    there = folder / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", there], check=True)
    [site] = there.glob("lib/python*/site-packages")
    (site / "all.pth").write_text(sysconfig.get_path("purelib") + "\n")
    text = Path(of_program(program)).read_text().split("\n", 1)[1]
    script = there / "bin" / program
    script.write_text(f"#!{there}/bin/python\n{text}")
    script.chmod(0o755)


def gunicorn(folder: Path) -> tuple[str, ...]:
    (folder / "app.py").write_text(WSGI)
    venv(folder, "gunicorn")
    return ("{release}/.venv/bin/gunicorn", "--preload", "--threads", "4", "app:app")


def uvicorn(folder: Path) -> tuple[str, ...]:
    (folder / "app.py").write_text(ASGI)
    venv(folder, "uvicorn")
    return ("{release}/.venv/bin/uvicorn", "--fd", "3", "--no-access-log", "app:app")


def node(folder: Path) -> tuple[str, ...]:
    (folder / "web.js").write_text(SOURCES["web.js"])
    return (of_program("node"), "web.js")


def go(folder: Path) -> tuple[str, ...]:
    (folder / "web.go").write_text(SOURCES["web.go"])
    subprocess.run([of_program("go"), "build", "-o", "web", "web.go"], cwd=folder, check=True)
    return ("{release}/web",)


def library(folder: Path) -> tuple[str, ...]:
    (folder / "web.py").write_text(LIBRARY)
    return (sys.executable, "{release}/web.py")


#: `make test` takes the first, which costs a third of one with a virtual environment.
KINDS: dict[str, tuple[Callable[[Path], tuple[str, ...]], tuple[str, ...]]] = {
    "library": (library, ()),
    "gunicorn": (gunicorn, LISTENER),
    "uvicorn": (uvicorn, LISTENER),
    "node": (node, LISTENER),
    "go": (go, LISTENER),
}


def served_by(one: Operated, traffic: Traffic, name: str) -> None:
    """Wait until a process of a release answers."""
    eventually(lambda: name in {release_of(pid) for pid in [*traffic.seen.answers]}, name)


def release_of(pid: int) -> str:
    try:
        return environment_of(pid).get("SOCKETPROTECTOR_RELEASE", "")
    except OSError:  # it has ended; PermissionError: of a zombie, for a user
        return ""


@pytest.mark.parametrize("kind", KINDS)
def test_no_request_fails_at_deploys_and_a_rollback(
    operated: Operating, tmp_path: Path, kind: str
) -> None:
    build, options = KINDS[kind]
    releases = Releases(tmp_path / "srv")
    command = [build(releases.folder / name) for name in ("1", "2")][-1]
    for each in ("app.py", "web.py", "web.js", "web"):
        (releases.folder / "bad" / each).write_text("syntax error\n")
    if command[0].startswith("{release}/.venv"):
        program = releases.folder / "bad" / command[0].removeprefix("{release}/")
        program.parent.mkdir(parents=True)
        program.symlink_to(releases.folder / "1" / command[0].removeprefix("{release}/"))
    one = operated(*releases.options, *options, "--chdir", "{release}", command=command)
    saved(one)

    with Traffic(one.address, pause_s=PAUSE_S) as traffic:
        served_by(one, traffic, "1")
        deployed(one, "2")
        served_by(one, traffic, "2")
        ended = ctl(one, "deploy", "bad")
        assert ended.status == 3, ended
        assert releases.named == "2"
        assert ctl(one, "rollback").status == 0
        before = traffic.seen.answers.total()
        traffic.wait_for_answers(20)
        assert traffic.seen.answers.total() > before
    assert (releases.named, one.status()["releases"]["serving"]) == ("1", "1")
    assert not traffic.seen.failures
    one.daemon.stop()
