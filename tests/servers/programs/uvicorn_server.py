"""uvicorn that reads what it has accepted before it leaves.  Usage: uvicorn_server.py FD"""

from __future__ import annotations

import asyncio
import socket
import sys

import uvicorn

GRACE_S = 1.0  # for requests that are on their way in connections that were accepted already


class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for each in self.servers:
            each.close()
        await asyncio.sleep(GRACE_S)
        await super().shutdown(sockets)


Server(uvicorn.Config("asgi_app:app", fd=int(sys.argv[1]), loop="uvloop", lifespan="on")).run()
