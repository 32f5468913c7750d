"""An ASGI application with WebSockets, endless answers and an answer behind a gate (a FIFO)."""

from __future__ import annotations

import asyncio
from typing import Any


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        return
    if scope["type"] != "http":
        return
    if scope["path"] not in ("/", "/stream"):
        await asyncio.get_running_loop().run_in_executor(None, _wait, scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/stream":
        left = asyncio.ensure_future(_left(receive))
        while not left.done():
            await send({"type": "http.response.body", "body": b"tick\n", "more_body": True})
            await asyncio.sleep(0.01)
        return
    await send({"type": "http.response.body", "body": b"whole"})


def _wait(gate: str) -> None:
    with open(gate, "rb") as opened:
        opened.read()


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
