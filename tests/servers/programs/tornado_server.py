"""tornado on a listener that it was handed.  Usage: tornado_server.py FD

Its close_all_connections() cuts requests under way, so it waits for them itself.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

from ready import ready
from release import STATUS
from tornado.httpserver import HTTPServer
from tornado.web import Application, RequestHandler

WAIT_S = float(os.environ.get("WAIT_S", "0"))
GRACE_S = 1.0  # for requests that are on their way in connections that were accepted already
under_way = 0
told = asyncio.Event()


class Answer(RequestHandler):
    def prepare(self) -> None:
        global under_way
        under_way += 1
        if told.is_set():
            self.set_header("Connection", "close")

    def on_finish(self) -> None:
        global under_way
        under_way -= 1

    async def get(self) -> None:
        await asyncio.sleep(WAIT_S)
        self.set_status(STATUS)
        await self.finish(f"{os.getpid()}\n")


async def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.setblocking(False)
    server = HTTPServer(Application([("/", Answer)]))
    server.add_socket(listener)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    ready()
    await told.wait()
    server.stop()
    await asyncio.sleep(GRACE_S)
    while under_way:
        await asyncio.sleep(0.01)
    await server.close_all_connections()


asyncio.run(main())
