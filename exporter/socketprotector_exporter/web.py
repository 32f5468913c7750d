"""The page of `--web`: its requests, its allowed hosts, and its thread.

The page is read-only by design: it answers GET and HEAD, takes no argument, and reads only status
and events from instances.  /metrics (http.py) does not depend on the page.

Source: starlette.io; asgi.readthedocs.io; developer.mozilla.org for the headers.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import re
import socket
import stat
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from socketprotector.ctl.api import SystemRefused, UsageError, on_error, whole

from .visits import Visits
from .web_hub import Hub

DEFAULT = "127.0.0.1:9433"
VIEWERS = 64
#: A viewer that reads nothing for this long is gone.
_UNREAD_MS = 60_000
_BACKLOG = 256
_FOLDER = Path(__file__).with_name("page")
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/events.js": ("events.js", "text/javascript"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
#: The Host headers of a browser on this machine.  A site whose name resolves to 127.0.0.1 (DNS
#: rebinding) sends its own name, and is refused.
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class _Guard:
    """Refuses requests for other host names, and adds the headers to every answer."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {*_LOOPBACK, *(each.lower() for each in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app = self._app
        if scope["type"] == "http":
            hosts = Headers(scope=scope).getlist("host")
            if len(hosts) != 1 or _name_in(hosts[0]) not in self._hosts:
                app = PlainTextResponse(
                    "this host name is not allowed: use localhost, or start the exporter with "
                    "--web-host NAME\n",
                    403,
                )
        await app(scope, receive, send_with_headers)


def _name_in(host: str) -> str:
    """Return a Host header without its port."""
    name, bracket, _ = host.partition("]")
    return (name + bracket if host.startswith("[") else host.partition(":")[0]).lower()


def application(hub: Hub, hosts: Sequence[str] = ()) -> ASGIApp:
    """Return the page and its events as an ASGI application.

    hosts: allowed host names, besides those of the loopback address.
    """

    async def events(request: Request) -> ASGIApp:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        return to_viewer

    async def to_viewer(scope: Scope, receive: Receive, send: Send) -> None:
        # No await between the check and viewer(), so that simultaneous viewers are all counted.
        if hub.viewers >= VIEWERS:
            refusal = PlainTextResponse(f"there are already {VIEWERS} viewers\n", 503)
            return await refusal(scope, receive, send)
        with hub.viewer() as news:
            answer = StreamingResponse(hub.watch(news), media_type="text/event-stream")
            await answer(scope, receive, send)

    routes = [Route(path, _file(*file)) for path, file in _FILES.items()]
    return _Guard(Starlette(routes=[*routes, Route("/events", events)]), hosts)


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (_FOLDER / name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


class Page:
    """A listening socket with the page."""

    def __init__(self, address: str, hosts: Sequence[str], find: Callable[[], list[str]]) -> None:
        """Bind and listen.  Raises UsageError and OSError.

        address: the value of `--web`.
        hosts: the values of `--web-host`.
        find: returns the paths of control sockets; it may block.
        """
        self._hosts, self._find = hosts, find
        self._path, self._socket = "", socket.socket()
        if address.startswith(("/", "unix:")):
            self._path, self._socket = _bind_unix(address)
        else:
            self._socket = _bind_tcp(address)
            self._hosts = (*hosts, _name_in(self._netloc))  # any of 127.0.0.0/8

    @property
    def where(self) -> str:
        """The address of the page, for people."""
        return f"unix:{self._path}" if self._path else f"http://{self._netloc}/"

    @property
    def _netloc(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"{f'[{host}]' if ':' in host else host}:{port}"

    def remove_file(self) -> None:
        """Remove the socket's file, if it has one.  Raises OSError."""
        if self._path:
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass

    def run(self) -> None:
        """Serve until the process ends."""
        try:
            asyncio.run(self._serve())
        except BaseException:  # ends the process, because a missing page would go unnoticed
            with ExitStack() as last:
                last.callback(os._exit, SystemRefused.status)
                last.callback(self.remove_file)
                traceback.print_exc()

    async def _serve(self) -> None:
        hub = Hub(self._find)
        config = uvicorn.Config(
            application(hub, self._hosts),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(hub.run())
            server = uvicorn.Server(config)
            tasks.create_task(server.serve(sockets=[]))
            Visits(self._socket, config, server.server_state).watch()


def _bind_tcp(address: str) -> socket.socket:
    host, colon, port = address.rpartition(":")
    if not colon or whole(port, 65535) is None:
        raise UsageError(f"--web {address}: write {DEFAULT}, [::1]:9433 or /PATH?mode=0660")
    host = "127.0.0.1" if host.lower() == "localhost" else host.strip("[]")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UsageError(
            f"--web {address}: the page has no log-in and last words may have secrets; use "
            "127.0.0.1, [::1] or a UNIX socket (/PATH?mode=0660), and a proxy with a log-in for "
            "other users"
        )
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    with on_error(made.close):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit this option, so that a viewer whose machine sleeps loses its place.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
        made.bind((host, int(port)))
        made.listen(_BACKLOG)
    return made


def _bind_unix(address: str) -> tuple[str, socket.socket]:
    """Bind a path, in place of a stale socket file; return the path and the socket."""
    path, _, query = address.removeprefix("unix:").partition("?")
    options = dict(each.partition("=")[::2] for each in query.split("&") if each)
    mode = options.pop("mode", "0600")
    if options or not path.startswith("/") or not re.fullmatch(r"0?[0-7]{3}", mode):
        raise UsageError(f"--web {address}: write an absolute path and its mode: /PATH?mode=0660")
    made = socket.socket(socket.AF_UNIX)
    with on_error(made.close):
        _remove_stale(path)
        # By umask, so that the file never has another mode; no other thread makes files yet.
        before = os.umask(0o777 & ~int(mode, 8))
        try:
            made.bind(path)
        finally:
            os.umask(before)
        made.listen(_BACKLOG)
    return path, made


def _remove_stale(path: str) -> None:
    """Remove a socket file that another exporter has left."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return  # bind() raises the error
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)
