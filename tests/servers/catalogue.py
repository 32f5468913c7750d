"""The servers that are tried under --handoff listener, and how each is started.

One place for the command lines: docs/servers.md shows the same (test_servers_page.py).
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
_PYTHON = sys.executable
_SCRIPTS = Path(sysconfig.get_path("scripts"))


@dataclass(frozen=True)
class Server:
    """One of them."""

    name: str
    command: tuple[str, ...]  # run in PROGRAMS
    options: tuple[str, ...] = ()  # of ours
    module: str = ""  # the Python module that must be there
    program: str = ""  # or the program; from a Debian package
    loses: bool = False  # it drops connections that it has accepted when it is told to finish

    @property
    def arguments(self) -> list[str]:
        """Ours, from --handoff on."""
        return [
            "--handoff",
            "listener",
            *self.options,
            "--chdir",
            str(PROGRAMS),
            "http=127.0.0.1:0",
            "--",
            *self.command,
        ]

    def needed(self) -> None:
        """Skip where it is not installed."""
        if self.module and importlib.util.find_spec(self.module) is None:
            pytest.skip(f"NOT CHECKED: {self.module} is not installed")
        if self.program and shutil.which(self.program) is None:
            pytest.skip(f"NOT CHECKED: {self.program} is not installed; see `make test`")


def _script(name: str) -> str:
    return str(_SCRIPTS / name)


SOON = ("--ready", "after:100ms")
SERVERS = {
    each.name: each
    for each in (
        Server(
            "uvicorn",
            (_script("uvicorn"), "--fd", "{fd:http}", "--loop", "uvloop", "asgi_app:app"),
            SOON,
            module="uvicorn",
        ),
        Server(
            "uvicorn-patient",
            (_PYTHON, "uvicorn_server.py", "{fd:http}"),
            SOON,
            module="uvicorn",
        ),
        Server("aiohttp-run-app", (_PYTHON, "aiohttp_run_app.py", "{fd:http}"), SOON, module="aiohttp"),
        Server(
            "gunicorn",
            (_script("gunicorn"), "--workers", "2", "wsgi_app:app"),
            module="gunicorn",
        ),
        Server(
            "hypercorn",
            (_script("hypercorn"), "--bind", "fd://{fd:http}", "--workers", "0", "asgi_app:app"),
            SOON,
            module="hypercorn",
        ),
        Server("aiohttp", (_PYTHON, "aiohttp_server.py", "{fd:http}"), SOON, module="aiohttp"),
        Server("tornado", (_PYTHON, "tornado_server.py", "{fd:http}"), SOON, module="tornado"),
        Server("waitress", (_PYTHON, "waitress_server.py", "{fd:http}"), SOON, module="waitress"),
        Server(
            "twisted",
            (
                _script("twistd"),
                "--nodaemon",
                "--pidfile=",
                "web",
                "--wsgi=wsgi_app.app",
                "--listen=systemd:domain=INET:index=0",
            ),
            SOON,
            module="twisted",
        ),
        Server("granian", (_PYTHON, "granian_server.py", "{fd:http}"), SOON, module="granian"),
        Server("node", ("node", "http.js", "{fd:http}"), SOON, program="node"),
        Server(
            "starlet",
            ("plackup", "--server", "Starlet", "--max-workers", "4", "app.psgi"),
            SOON,
            program="plackup",
        ),
        Server(
            "nginx",
            ("nginx", "-c", str(PROGRAMS / "nginx.conf"), "-e", "stderr"),
            (*SOON, "--env", "NGINX={fd:http};", "--drain-signal", "QUIT"),
            program="nginx",
        ),
    )
}
