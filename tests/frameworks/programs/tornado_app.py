"""tornado, without a handler for SIGTERM: the library ends it after its last client."""

from __future__ import annotations

import asyncio
import sys

from socketprotector_client import Listener, on_drain
from tornado import httpserver, web

from tests.frameworks.programs.pages import page


class Page(web.RequestHandler):
    async def get(self) -> None:
        self.write(await asyncio.to_thread(page, self.request.path))


async def main() -> None:
    server = httpserver.HTTPServer(web.Application([(".*", Page)]))
    listener = Listener(sys.argv[1])
    listener.setblocking(False)
    listener.listen()
    server.add_socket(listener)
    on_drain(lambda: setattr(server.conn_params, "no_keep_alive", True))
    await asyncio.Event().wait()


asyncio.run(main())
