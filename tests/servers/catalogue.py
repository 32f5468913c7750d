"""The servers that are tried under --handoff listener, and how each is started; docs/servers.md."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"
#: In a command: the path of nginx' configuration.
CONFIGURATION = "nginx.conf"
_PYTHON = sys.executable
_SCRIPTS = Path(sysconfig.get_path("scripts"))

#: How long an application takes for an answer, so that requests are under way when the signal
#: comes.
WAIT_S = "0.005"
#: Of each client between its requests: enough of them for one to come at the wrong moment.
PAUSE_S = 0.02


@dataclass(frozen=True)
class Server:
    """One of them."""

    name: str
    command: tuple[str, ...]  # run in PROGRAMS
    options: tuple[str, ...] = ()  # of ours
    module: str = ""  # the Python module that must be there
    program: str = ""  # or the program; from a Debian package
    listener: str = ""  # options of ours
    waits: bool = False  # for the first request of each connection that it has accepted

    def arguments(self, folder: Path, free_port: Callable[[], int]) -> list[str]:
        """Ours.  folder, free_port: for a configuration that must name the port."""
        port = 0
        command = self.command
        if CONFIGURATION in command:
            port = free_port()
            text = (PROGRAMS / "nginx.conf").read_text(encoding="utf-8")
            made = folder / "nginx.conf"
            made.write_text(
                text.replace("PORT", str(port)).replace("FOLDER", str(folder)), encoding="utf-8"
            )
            command = tuple(str(made) if word == CONFIGURATION else word for word in command)
        ours = ["--handoff", "listener", *self.options, "--chdir", str(PROGRAMS)]
        return [*ours, f"http=127.0.0.1:{port}{self.listener}", "--", *command]

    def needed(self) -> None:
        """Skip where it is not installed."""
        if self.module and importlib.util.find_spec(self.module) is None:
            pytest.skip(f"NOT CHECKED: {self.module} is not installed")
        if self.program and shutil.which(self.program) is None:
            pytest.skip(f"NOT CHECKED: {self.program} is not installed; see `make test`")


def _script(name: str) -> str:
    return str(_SCRIPTS / name)


#: The application says it when it has started.
SAYS = ("--ready", "notify")


def _command(name: str, *command: str, **more: Any) -> Server:
    """Its own command."""
    return Server(name, command, **more)


def _program(name: str, *words: str, **more: Any) -> Server:
    """A small program around it, beside this file."""
    command = (_PYTHON, f"{name}_server.py", *words)
    return Server(f"{name}-program", command, SAYS, module=name, **more)


_ALL = (
    _command(
        "uvicorn",
        *(_script("uvicorn"), "--fd", "{fd:http}", "--loop", "uvloop", "asgi_app:app"),
        options=SAYS,
        module="uvicorn",
    ),
    _command(
        "uvicorn-asyncio",
        *(_script("uvicorn"), "--fd", "{fd:http}", "--loop", "asyncio", "asgi_app:app"),
        options=SAYS,
        module="uvicorn",
    ),
    _command(
        "gunicorn",
        *(_script("gunicorn"), "--preload", "--workers", "2", "wsgi_app:app"),
        module="gunicorn",
    ),
    _command(
        "gunicorn-threads",
        *(_script("gunicorn"), "--preload", "--threads", "4", "wsgi_app:app"),
        module="gunicorn",
    ),
    _command(
        "hypercorn",
        *(_script("hypercorn"), "--bind", "fd://{fd:http}", "--workers", "0", "asgi_app:app"),
        options=SAYS,
        module="hypercorn",
    ),
    _command(
        "hypercorn-uvloop",
        *(_script("hypercorn"), "-k", "uvloop", "--bind", "fd://{fd:http}"),
        *("--workers", "0", "asgi_app:app"),
        options=SAYS,
        module="hypercorn",
    ),
    _program("aiohttp", "{fd:http}"),
    _program("tornado", "{fd:http}"),
    _program("waitress", "{fd:http}"),
    _program("twisted"),
    _program("granian", "{fd:http}"),
    _command("node", "node", "http.js", "{fd:http}", "{fd:ready}", program="node", waits=True),
    _command(
        "starlet",
        *("plackup", "--server", "Starlet", "--max-workers", "4", "app.psgi"),
        program="plackup",
    ),
    _command(
        "starman",
        *("starman", "--workers", "12", "app.psgi"),  # one for each connection that is kept
        options=("--drain-signal", "QUIT"),
        program="starman",
    ),
    _command(
        "nginx",
        *("nginx", "-c", CONFIGURATION, "-e", "stderr"),
        listener="?nonblock=1",
        options=("--env", "NGINX={fd:http};", "--drain-signal", "QUIT"),
        program="nginx",
        waits=True,
    ),
)
SERVERS = {each.name: each for each in _ALL}
