"""aiohttp that reads what it has accepted before it leaves.  Usage: aiohttp_server.py FD"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

from aiohttp import web
from ready import ready

WAIT_S = float(os.environ.get("WAIT_S", "0"))
GRACE_S = 1.0  # for requests that are on their way in connections that were accepted already


async def answer(request: web.Request) -> web.Response:
    await asyncio.sleep(WAIT_S)
    return web.Response(text=f"{os.getpid()}\n")


async def main() -> None:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, told.set)
    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    listener = socket.socket(fileno=int(sys.argv[1]))
    await web.SockSite(runner, listener).start()
    ready()
    await told.wait()
    # Not by site.stop(): asyncio drops what it has accepted in the turn before (docs/servers.md).
    loop.remove_reader(listener)
    await asyncio.sleep(GRACE_S)
    await runner.cleanup()


asyncio.run(main())
