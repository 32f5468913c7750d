"""http.server on a Listener that binds where the server would have."""

from __future__ import annotations

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from socketprotector_client import Listener, draining


class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{os.getpid()} {draining()}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if draining():
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        self.socket.close()
        self.socket = Listener()
        super().server_bind()


Server(("127.0.0.1", int(sys.argv[1])), Page).serve_forever()
