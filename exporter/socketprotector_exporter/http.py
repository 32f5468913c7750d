"""Answers over HTTP or HTTPS: /metrics, /healthz, /readyz, /readyz/NAME.

Source: ssl, http.server.
"""

from __future__ import annotations

import hmac
import io
import ssl
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from socketprotector import __version__
from socketprotector.ctl.api import UsageError, escape

from .bounded import CONNECTION_S, BoundedServer
from .collector import ProtectorCollector
from .token_file import read_token

_PAGES = "/metrics, /healthz, /readyz, /readyz/NAME"
#: The beginning of the path for one instance.
_ONE = "/readyz/"
#: The query with which an unhealthy instance counts as unready.
_HEALTH = "health"
_HEAD_BYTES = 16 * 1024


def _origin_form(target: str) -> str:
    """Return a target without scheme and host, which may precede the path (RFC 9112, 3.2.2)."""
    scheme, found, rest = target.partition("://")
    if not found or scheme.lower() not in ("http", "https"):
        return target
    end = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    return rest[end:] if rest[end : end + 1] == "/" else f"/{rest[end:]}"


class Server(BoundedServer):
    """The HTTP or HTTPS server, with a thread for each connection.

    Not an HTTPServer, which looks up its own name: without a name server that takes many seconds.
    """

    def __init__(
        self,
        address: tuple[str, int],
        instances: ProtectorCollector,
        tls: ssl.SSLContext | None,
        token: str | None = None,
    ) -> None:
        """Bind and listen.  Raises OSError.

        token: the file of the token that /metrics requires; None: no token.
        """
        self.instances = instances
        self.token = token
        self.registry = CollectorRegistry()
        self.registry.register(instances)
        self._tls = tls
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        """The URL without a path; in a URL, the % before an interface is %25 (RFC 6874)."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{self.where.replace('%', '%25')}"

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; its thread makes the TLS handshake.  Raises OSError."""
        request, address = super().get_request()
        if self._tls is not None:
            request = self._tls.wrap_socket(
                request, server_side=True, do_handshake_on_connect=False
            )
        return request, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection.  Raises OSError if the client speaks no TLS, or too slowly."""
        if self._tls is not None:
            request.do_handshake()
        super().finish_request(request, client_address)


class _TooLong(OSError):
    """A request's head exceeds the limit of bytes or of time."""


class _Head(io.RawIOBase):
    """Reads a request's head up to a limit; http.server would read 6 MB before any token check."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._left, self._until_s = _HEAD_BYTES, time.monotonic() + CONNECTION_S

    def readable(self) -> bool:
        """Return True, as io requires."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the available bytes.  Raises _TooLong, OSError."""
        left_s = self._until_s - time.monotonic()
        if not self._left or left_s <= 0:
            raise _TooLong
        self._request.settimeout(left_s)
        with memoryview(buffer) as whole:
            count = int(self._request.recv_into(whole[: self._left]))
        self._left -= count
        return count


class Handler(BaseHTTPRequestHandler):
    """One connection with one request."""

    server: Server
    server_version = f"socketprotector-exporter/{__version__}"
    sys_version = ""
    error_message_format = "%(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def setup(self) -> None:
        """Read the request through the bounded reader."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Head(self.request))

    def handle(self) -> None:
        """Answer one request, even if its head is too long."""
        try:
            super().handle()
        except _TooLong:
            self.request_version, self.requestline, self.command = self.protocol_version, "", ""
            self.request.settimeout(CONNECTION_S)
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def do_GET(self) -> None:
        self.server.begin_answer(self.request)
        page, _, query = _origin_form(self.path).partition("?")
        match page:
            case "/metrics" if self._is_refused():
                pass
            case "/metrics":
                encode, kind = self._format()
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

    def _format(self) -> tuple[Callable[[CollectorRegistry], bytes], str]:
        """Return the encoder of the metrics that the client accepts, and its content type."""
        try:
            return choose_encoder(self.headers.get("Accept") or "")
        except Exception:  # it fails for odd Accept headers; any client accepts plain text
            return choose_encoder("")

    def _is_refused(self) -> bool:
        """Refuse a client without the token; return whether it was refused.  For /metrics only."""
        if self.server.token is None:
            return False
        try:
            wanted = f"Bearer {read_token('--token', self.server.token)}"
        except UsageError:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, "the file of --token is no longer usable")
            return True
        brought = self.headers.get("Authorization") or ""
        if hmac.compare_digest(brought.encode("utf-8", "replace"), wanted.encode()):
            return False
        self._say(HTTPStatus.UNAUTHORIZED, "give the token", ("WWW-Authenticate", "Bearer"))
        return True

    def _say_ready(self, name: str, query: str) -> None:
        unready, unhealthy = self.server.instances.unready(name)
        # All hosts may be unhealthy at once, so health counts only if the balancer requests it.
        counts = _HEALTH in query.split("&")
        refused = unready or (counts and unhealthy)
        status = HTTPStatus.SERVICE_UNAVAILABLE if refused else HTTPStatus.OK
        # Escaped: the name may come from the client, and a reason from a worker.
        self._say(status, "\n".join(map(escape, (*unready, *unhealthy))) or "ok")

    def _say(self, status: HTTPStatus, text: str, *headers: tuple[str, str]) -> None:
        self._answer(status, f"{text}\n".encode(), "text/plain; charset=utf-8", *headers)

    def _answer(
        self, status: HTTPStatus, body: bytes, kind: str, *headers: tuple[str, str]
    ) -> None:
        self.server.await_client(self.request)
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: each scrape would be a line."""
