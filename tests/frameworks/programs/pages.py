"""What every program here answers: its pid, at once or when a gate opens.

`GET /` answers with the process's number.  `GET /PATH-OF-A-FIFO` first reads that to its end.
`GET /hello-N`, which tests/load.py sends, takes 5 ms, so kills meet requests under way.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from socketprotector_client import draining


def page(path: str) -> bytes:
    """Answer a request; blocks at a gate."""
    if path.startswith("/hello-"):
        time.sleep(0.005)
        return b"[%d] %s\n" % (os.getpid(), path[1:].encode())
    if path != "/":
        with open(path, "rb") as gate:
            gate.read()
    return str(os.getpid()).encode()


def answer(request: bytes) -> tuple[bytes, bool]:
    """For what speaks no HTTP: the response to a request's head, and whether it is the last."""
    body = page(request.split()[1].decode())
    last = draining() or b"connection: close" in request.lower()
    end = b"Connection: close\r\n" if last else b""
    return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (end, len(body), body), last


def wsgi(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """The WSGI application."""
    body = page(environ["PATH_INFO"])
    headers = [("Content-Length", str(len(body))), ("Peer", environ.get("REMOTE_ADDR", ""))]
    start_response("200 OK", headers)
    return [body]


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """The ASGI application."""
    if scope["type"] == "http":
        body = await asyncio.to_thread(page, scope["path"])
        length = str(len(body)).encode()
        headers = [(b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
