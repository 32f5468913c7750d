"""The servers that are tried under --handoff listener, and how each is started; docs/servers.md."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import needs

PROGRAMS = Path(__file__).parent / "programs"
#: In a command: the path of nginx' configuration, which is its release.
CONFIGURATION = "nginx.conf"
_PYTHON = sys.executable
_SCRIPTS = Path(sysconfig.get_path("scripts"))

#: How long an application takes for an answer, so that requests are under way when the signal
#: comes.
WAIT_S = "0.005"
#: Of each client between its requests: enough of them for one to come at the wrong moment.
PAUSE_S = 0.02


class Release:
    """What a server reads when it starts: the file that RELEASE names; nginx: its configuration."""

    def __init__(self, path: Path, text: str) -> None:
        """Write it, a good one.  text: with STATUS for what it answers."""
        self._path, self._text = path, text
        self.answers(200)

    def answers(self, status: int) -> None:
        """Let the next one answer so, to everything."""
        new = self._path.with_suffix(".new")
        new.write_text(self._text.replace("STATUS", str(status)), encoding="utf-8")
        new.rename(self._path)

    def breaks(self) -> None:
        """Let the next one fail as it loads."""
        new = self._path.with_suffix(".new")
        new.write_text("syntax error\n", encoding="utf-8")
        new.rename(self._path)

    def hangs(self) -> None:
        """Let the next one wait for its file for ever, as on a file system that has gone away."""
        self._path.unlink()
        os.mkfifo(self._path)


@dataclass(frozen=True)
class Server:
    """One of them."""

    name: str
    command: tuple[str, ...]  # run in PROGRAMS
    options: tuple[str, ...] = ()  # of ours
    ready: tuple[str, ...] = ()  # of ours, too: --ready
    module: str = ""  # the Python module that must be there
    program: str = ""  # or the program; from a Debian package
    listener: str = ""  # options of ours
    tells: bool = False  # that it is ready, by itself, where it is not asked
    at_path: tuple[str, ...] = ()  # its command on a UNIX socket, if that is another one
    path_options: tuple[str, ...] = ()  # more of ours there
    waits: bool = False  # for the first request of each connection that it has accepted

    def deployed(
        self,
        folder: Path,
        free_port: Callable[[], int],
        *options: str,
        ready: tuple[str, ...] | None = None,
        unix: Path | None = None,
    ) -> tuple[list[str], Release]:
        """Our arguments, and the release that they start.

        folder: for the release.  free_port: where that must name the port.  options: more of ours.
        ready: instead of its own.  unix: the path to listen at, instead of a port.
        """
        port, text, path = 0, "STATUS\n", folder / "release"
        command = self.at_path if unix and self.at_path else self.command
        if CONFIGURATION in command:
            port = free_port()
            text = (PROGRAMS / "nginx.conf").read_text(encoding="utf-8")
            text = text.replace("PORT", str(port)).replace("FOLDER", str(folder))
            command = tuple(str(path) if word == CONFIGURATION else word for word in command)
        ready = self.ready if ready is None else ready
        ours = ["--handoff", "listener", *self.options, *ready, *options]
        ours += ["--env", f"RELEASE={path}", "--chdir", str(PROGRAMS)]
        ours += self.path_options if unix else ()
        address = f"unix:{unix}" if unix else f"127.0.0.1:{port}"
        words = [*ours, f"http={address}{self.listener}", "--", *command]
        return words, Release(path, text)

    def arguments(self, folder: Path, free_port: Callable[[], int]) -> list[str]:
        """Those of a release that stays as it is."""
        return self.deployed(folder, free_port)[0]

    def needed(self) -> None:
        """Skip where it is not installed."""
        if self.module and importlib.util.find_spec(self.module) is None:
            needs.skip(self.module)
        if self.program and shutil.which(self.program) is None:
            needs.skip(self.program)


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
    return Server(f"{name}-program", command, ready=SAYS, module=name, **more)


#: One process for each connection that is kept.
_STARMAN = ("starman", "--preload-app", "--workers", "12")
#: Net::Server changes the owner of the path at the start and deletes it at the exit.  Of this path
#: it cannot delete anything.
_STARMAN_AT = "/dev/fd/{fd:http}"

_ALL = (
    _command(
        "uvicorn",
        *(_script("uvicorn"), "--fd", "{fd:http}", "--loop", "uvloop", "asgi_app:app"),
        ready=SAYS,
        module="uvicorn",
    ),
    _command(
        "uvicorn-asyncio",
        *(_script("uvicorn"), "--fd", "{fd:http}", "--loop", "asyncio", "asgi_app:app"),
        ready=SAYS,
        module="uvicorn",
    ),
    _command(
        "gunicorn",
        *(_script("gunicorn"), "--preload", "--workers", "2", "wsgi_app:app"),
        module="gunicorn",
        tells=True,
    ),
    _command(
        "gunicorn-threads",
        *(_script("gunicorn"), "--preload", "--threads", "4", "wsgi_app:app"),
        module="gunicorn",
        tells=True,
    ),
    _command(
        "hypercorn",
        *(_script("hypercorn"), "--bind", "fd://{fd:http}", "--workers", "0", "asgi_app:app"),
        ready=SAYS,
        module="hypercorn",
    ),
    _command(
        "hypercorn-uvloop",
        *(_script("hypercorn"), "-k", "uvloop", "--bind", "fd://{fd:http}"),
        *("--workers", "0", "asgi_app:app"),
        ready=SAYS,
        module="hypercorn",
    ),
    _program("aiohttp", "{fd:http}"),
    _program("tornado", "{fd:http}"),
    _program("waitress", "{fd:http}"),
    _program("twisted"),
    _program("granian", "{fd:http}"),
    _command(
        "node",
        *("node", "http.js", "{fd:http}", "{fd:ready}"),
        program="node",
        tells=True,
        waits=True,
    ),
    _command(
        "starlet",
        *("plackup", "--server", "Starlet", "--max-workers", "4", "app.psgi"),
        program="plackup",
    ),
    _command(
        "starman",
        *(*_STARMAN, "app.psgi"),
        options=("--drain-signal", "QUIT"),
        program="starman",
        at_path=(*_STARMAN, "--listen", _STARMAN_AT, "app.psgi"),
        path_options=(
            *("--env", "SERVER_STARTER_PORT="),
            *("--env", f"BOUND_SOCKETS={{fd:http}}|*|{_STARMAN_AT}|UNIX|*"),
        ),
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

#: Those that are tried behind a proxy.
BEHIND = {
    **{
        name: SERVERS[name]
        for name in (
            "gunicorn",
            "gunicorn-threads",
            "uvicorn",
            "hypercorn",
            "node",
            "starlet",
            "starman",
        )
    },
    "gunicorn-uvicorn": _command(
        "gunicorn-uvicorn",
        *(_script("gunicorn"), "--preload", "--workers", "2"),
        *("-k", "uvicorn_worker.UvicornWorker", "asgi_app:app"),
        module="uvicorn_worker",
        tells=True,
    ),
    "uvicorn-workers": _command(
        "uvicorn-workers",
        *(_script("uvicorn"), "--fd", "{fd:http}", "--workers", "2", "asgi_app:app"),
        module="uvicorn",
    ),
}
