"""Wraps what it accepts, as a TLS server does, under a server that knows no draining."""

from __future__ import annotations

import socket
import socketserver
import ssl

from socketprotector_client import Listener

from tests.client.programs.talk import say


class Hold(socketserver.BaseRequestHandler):
    """Hold the connection, unencrypted bytes and all, until the client hangs up."""

    def setup(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.request = context.wrap_socket(
            self.request, server_side=True, do_handshake_on_connect=False
        )

    def handle(self) -> None:
        say("held")
        # The record layer would refuse what the client sends; the socket does not.
        bare = socket.socket(fileno=self.request.fileno())
        bare.recv(1)
        bare.detach()
        say("let go")

    def finish(self) -> None:
        self.request.close()


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.close()
        self.socket = Listener()
        super().server_bind()


Server(("", 0), Hold).serve_forever()
