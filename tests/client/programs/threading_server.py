"""socketserver on a Listener; it knows neither SIGTERM nor draining."""

from __future__ import annotations

import socketserver

from socketprotector_client import Listener

from tests.client.programs.talk import options, say, talk


class Talk(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        talk(self.request)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True  # so that only the library keeps the process for its clients


chosen = options()
try:
    with Server(("", 0), Talk, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = Listener(chosen.address, limit=chosen.limit)
        server.server_activate()
        server.serve_forever()
finally:
    say("ended")
