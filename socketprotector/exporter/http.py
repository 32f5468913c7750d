"""Answers over HTTP or HTTPS: /metrics, /healthz, /readyz, /readyz/NAME.

A client that connects and sends nothing delays no other: each connection has a thread, a limit of
time, and is one of a limited number.  Source: ssl, http.server.
"""

from __future__ import annotations

import socket
import ssl
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from .. import __version__
from ..model.text import escape
from .collector import ProtectorCollector

#: For a handshake, for a request, and for each answer.
CONNECTION_S = 10.0
CONNECTIONS = 64
_PAGES = "/metrics, /healthz, /readyz, /readyz/NAME"
#: What the path of one instance's page begins with.
_ONE = "/readyz/"
#: Behind either: unhealthy is not ready.
_HEALTH = "health"


class Server(ThreadingHTTPServer):
    """Listens; a thread for each connection."""

    def __init__(
        self, address: tuple[str, int], instances: ProtectorCollector, tls: ssl.SSLContext | None
    ) -> None:
        """Bind and listen.  Raises OSError."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.instances = instances
        self.registry = CollectorRegistry()
        self.registry.register(instances)
        self._tls = tls
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take it unless too many are there."""
        return self._free.acquire(blocking=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give it a thread of its own."""
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection; the handshake, too, is this thread's."""
        try:
            request.settimeout(CONNECTION_S)
            if self._tls is not None:
                try:
                    request = self._tls.wrap_socket(request, server_side=True)
                except OSError:  # no TLS, or not in time
                    request.close()
                    return
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore it: a client has gone away."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    server_version = f"socketprotector-exporter/{__version__}"
    sys_version = ""
    error_message_format = "%(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def do_GET(self) -> None:
        page, _, query = self.path.partition("?")
        match page:
            case "/metrics":
                encode, kind = choose_encoder(self.headers.get("Accept") or "")
                self._answer(HTTPStatus.OK, encode(self.server.registry), kind)
            case "/healthz":
                self._say(HTTPStatus.OK, "ok")
            case "/readyz":
                self._say_ready("", query)
            case page if page.startswith(_ONE) and page != _ONE:
                self._say_ready(unquote(page.removeprefix(_ONE)), query)
            case _:
                self._say(HTTPStatus.NOT_FOUND, f"not here; there is {_PAGES}")

    do_HEAD = do_GET

    def _say_ready(self, name: str, query: str) -> None:
        unready, unhealthy = self.server.instances.unready(name)
        # A bad answer may be that of all hosts at once: only who asks for it takes them all out.
        counts = _HEALTH in query.split("&")
        refused = unready or (counts and unhealthy)
        status = HTTPStatus.SERVICE_UNAVAILABLE if refused else HTTPStatus.OK
        # A name may be the client's own, and a reason what a worker has answered.
        self._say(status, "\n".join(map(escape, (*unready, *unhealthy))) or "ok")

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._answer(status, f"{text}\n".encode(), "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: there is a request for each scrape."""
