"""SCGI and FastCGI programs behind nginx, started for each connection.

What `socket -B ADDR -s PORT -b -f -q -l -p "WRAPPER PROGRAM"` was used for.  (The protocol is the
wrapper's business; those here are tests/stdio/programs/scgi.py and fastcgi.py.)
"""

from __future__ import annotations

import http.client
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import needs
from tests.nginx import own_folders
from tests.running import DEADLINE_S, Protector, eventually
from tests.stdio.pools import PROGRAMS, pool

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
pytestmark = needs.unless(NGINX is not None, "nginx")
Start = Callable[..., Protector]
Asked = tuple[int, str]

CONFIGURATION = """\
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ }}
http {{
    access_log off;
    {own_folders}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            {kind}_pass {upstream};
            {kind}_param REQUEST_METHOD $request_method;
            {kind}_param REQUEST_URI $request_uri;
            {kind}_param CONTENT_LENGTH $content_length;
            {scgi}
        }}
    }}
}}
"""


class Site:
    """nginx before a protector."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, body: bytes | None = None) -> Asked:
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            line.request("GET" if body is None else "POST", path, body)
            answer = line.getresponse()
            return answer.status, answer.read().decode()
        finally:
            line.close()

    def answers(self) -> bool:
        try:
            return self.ask("/")[0] == 200
        except OSError:
            return False


@pytest.fixture(params=["scgi", "fastcgi"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["tcp", "unix"])
def behind(
    request: pytest.FixtureRequest,
    kind: str,
    protector: Start,
    marked_environment: dict[str, str],
    tmp_path: Path,
    free_port: Callable[[], int],
) -> Iterator[tuple[Site, Protector]]:
    """A site whose requests are answered by a program each, 3 at once."""
    address = "127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/s"
    wrapper = (sys.executable, "-S", "-E", PROGRAMS / f"{kind}.py")
    daemon = protector(address, "--", *pool(3, *wrapper, PROGRAMS / "cgi.sh")).ready()
    port = free_port()
    (tmp_path / "nginx.conf").write_text(
        CONFIGURATION.format(
            own_folders=own_folders(tmp_path),
            folder=tmp_path,
            port=port,
            kind=kind,
            upstream=f"127.0.0.1:{daemon.port}" if request.param == "tcp" else address,
            scgi="scgi_param SCGI 1;" if kind == "scgi" else "",
        )
    )
    assert NGINX is not None
    command = [NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    with (tmp_path / "said").open("wb") as said:
        nginx = subprocess.Popen(command, stderr=said, env=marked_environment)
    site = Site(port)
    try:
        eventually(site.answers, "nginx")
        yield site, daemon
    finally:
        nginx.terminate()
        nginx.wait(DEADLINE_S)
        print((tmp_path / "said").read_text(), (tmp_path / "error.log").read_text())


def test_a_request_is_answered_by_a_program(behind: tuple[Site, Protector]) -> None:
    site, daemon = behind

    status, text = site.ask("/page?a=b")
    assert (status, text.partition(" from ")[0]) == (200, "GET /page?a=b")
    body = b"x" * 200_000
    status, text = site.ask("/form", body)
    assert (status, text.partition(" from ")[0]) == (200, "POST /form")
    assert text.partition("\n")[2].encode() == body
    daemon.stop()


@pytest.mark.costly
def test_more_requests_than_programs_wait_their_turn(behind: tuple[Site, Protector]) -> None:
    site, daemon = behind

    with ThreadPoolExecutor(12) as callers:
        seen = list(callers.map(lambda number: site.ask(f"/{number}"), range(36)))

    assert [status for status, _ in seen] == [200] * 36
    assert [text.split()[1] for _, text in seen] == [f"/{number}" for number in range(36)]
    daemon.stop()


@pytest.mark.costly
def test_reloads_fail_no_request(behind: tuple[Site, Protector]) -> None:
    site, daemon = behind
    over = threading.Event()

    def caller(_: int) -> list[int]:
        seen = []
        while not over.is_set():
            seen.append(site.ask("/")[0])
        return seen

    with ThreadPoolExecutor(4) as callers:
        try:
            waiting = [callers.submit(caller, number) for number in range(4)]
            for _ in range(3):
                daemon.reload()
        finally:
            over.set()
        seen = [status for each in waiting for status in each.result(DEADLINE_S)]

    assert seen
    assert set(seen) == {200}
    daemon.stop()
