"""The Go program of docs/inherited-socket.md, and clients that keep their connections."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.pages import page
from tests.running import ROOT, Protector
from tests.scenarios.tools import spawned
from tests.web import Connection

Start = Callable[..., Protector]

PROGRAM = next(
    each.text
    for each in page.blocks(ROOT / "docs" / "inherited-socket.md")
    if each.file == "web.go"
)


@pytest.mark.slow
@pytest.mark.costly
def test_a_kept_connection_is_told_to_close_and_the_old_program_ends(
    protector: Start, tmp_path: Path
) -> None:
    if shutil.which("go") is None:
        needs.skip("go")
    (tmp_path / "web.go").write_text(PROGRAM)
    subprocess.run(["go", "build", "-o", "web", "web.go"], cwd=tmp_path, check=True)
    daemon = protector("--handoff", "listener", "127.0.0.1:0", "--", str(tmp_path / "web")).ready()
    with Connection(("127.0.0.1", daemon.port)) as client:
        client.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.answer() == spawned(daemon)[0]
        daemon.reload()
        daemon.log.wait_for(r"event=signalled\b.* signal=TERM")
        client.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.answer() == spawned(daemon)[0]
    daemon.log.wait_for(r"event=exited generation=1\b.*exited with status 0")
    daemon.stop()
