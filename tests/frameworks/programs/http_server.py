"""http.server, and with it socketserver."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from socketprotector_client import Listener, draining

from tests.frameworks.programs.pages import page


class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = page(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if draining():
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        self.socket.close()
        self.socket = Listener(sys.argv[1])
        self.server_address = self.socket.getsockname()


Server(("", 0), Page).serve_forever()
