"""A release: HTTP on the library's Listener.  It answers `pong`, and which version it is.

web.py VERSION              a good one
web.py VERSION broken       one that does not start
web.py VERSION late SECONDS one whose /healthz is bad so long after its first client
"""

import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from socketprotector_client import Listener, draining

version, *fault = sys.argv[1:]
if fault == ["broken"]:
    sys.exit(f"release {version}: no such table: customers")
bad_after_s = float(fault[1]) if fault[:1] == ["late"] else None
first_client_s: list[float] = []


class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        health = self.path == "/healthz"
        if not (health or first_client_s):
            first_client_s.append(time.monotonic())
        bad = (
            health
            and bad_after_s is not None
            and first_client_s
            and time.monotonic() - first_client_s[0] > bad_after_s
        )
        body = b"the cache is full" if bad else b"pong"
        self.send_response(500 if bad else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Version", version)
        if draining():
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        self.socket.close()
        self.socket = Listener(8000)
        self.server_address = self.socket.getsockname()


Server(("", 0), Page).serve_forever()
