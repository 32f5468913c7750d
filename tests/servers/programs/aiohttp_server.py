"""aiohttp's own run_app on a listener that it was handed.  Usage: aiohttp_server.py FD"""

from __future__ import annotations

import asyncio
import os
import socket
import sys

from aiohttp import web
from ready import ready
from release import STATUS

WAIT_S = float(os.environ.get("WAIT_S", "0"))


async def answer(request: web.Request) -> web.Response:
    await asyncio.sleep(WAIT_S)
    return web.Response(text=f"{os.getpid()}\n", status=STATUS)


app = web.Application()
app.router.add_get("/", answer)


async def started(app: web.Application) -> None:
    ready()


app.on_startup.append(started)
web.run_app(app, sock=socket.socket(fileno=int(sys.argv[1])), print=None)
