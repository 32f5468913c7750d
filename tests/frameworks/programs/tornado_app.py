"""tornado, which leaves the end to its user."""

from __future__ import annotations

import asyncio
import signal
import sys

from socketprotector_client import Listener
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
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    server.stop()
    await server.close_all_connections()


asyncio.run(main())
