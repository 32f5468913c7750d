"""uvicorn on the loop of asyncio, with one short answer.

http_worker.py listener         on the library's Listener, under a protector
http_worker.py fd:N             on the socket that it is handed as descriptor N
http_worker.py HOST:PORT        listening by itself
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from socketprotector_client import Listener

HEADERS = [(b"content-type", b"text/plain"), (b"content-length", b"4")]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer `pong`."""
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": b"pong"})


options: dict[str, Any] = {
    "loop": "asyncio",
    "lifespan": "off",
    "log_level": "warning",
    "access_log": False,
    "timeout_keep_alive": 75,  # longer than a proxy keeps an idle connection
}
if sys.argv[1] == "listener":
    uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[Listener()])
elif sys.argv[1].startswith("fd:"):
    uvicorn.run(app, fd=int(sys.argv[1].removeprefix("fd:")), **options)
else:
    host, _, port = sys.argv[1].rpartition(":")
    uvicorn.Server(uvicorn.Config(app, host=host, port=int(port), **options)).run()
