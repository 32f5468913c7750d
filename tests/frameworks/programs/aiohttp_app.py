"""aiohttp's server."""

from __future__ import annotations

import asyncio
import sys

from aiohttp import web
from socketprotector_client import Listener

from tests.frameworks.programs.pages import page


async def get(request: web.Request) -> web.Response:
    return web.Response(body=await asyncio.to_thread(page, request.path))


app = web.Application()
app.router.add_get("/{path:.*}", get)
web.run_app(app, sock=Listener(sys.argv[1]), print=None)
