"""gevent's StreamServer, in a patched program."""

from gevent import monkey

monkey.patch_all()

import socket  # noqa: E402
import sys  # noqa: E402

import gevent  # noqa: E402
from gevent.server import StreamServer  # noqa: E402
from socketprotector_client.gevent import Listener  # noqa: E402

from tests.frameworks.programs.pages import answer  # noqa: E402


def talk(client: socket.socket, address: object) -> None:
    request, last = b"", False
    while not last and (data := client.recv(65536)):
        request += data
        if request.endswith(b"\r\n\r\n"):
            # The gate is no socket, so it would hold up all greenlets.
            response, last = gevent.get_hub().threadpool.apply(answer, (request,))
            client.sendall(response)
            request = b""


StreamServer(Listener(sys.argv[1]), talk).serve_forever()
