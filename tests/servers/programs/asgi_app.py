"""An ASGI application: each answer is the pid of its process, after WAIT_S."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ready import ready
from release import STATUS

BODY = f"{os.getpid()}\n".encode()
WAIT_S = float(os.environ.get("WAIT_S", "0"))


async def app(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            ready()
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await asyncio.sleep(WAIT_S)
    length = [(b"content-length", str(len(BODY)).encode())]
    await send({"type": "http.response.start", "status": STATUS, "headers": length})
    await send({"type": "http.response.body", "body": BODY})
