"""A handler that still works after it has closed its stream, and after the drain, at a SIGTERM."""

from __future__ import annotations

import os
import signal
import sys

import anyio
import trio
from socketprotector_client.anyio import Listener
from socketprotector_client.trio import serve
from socketprotector_client.worker import current

over: list[bool] = []
finish = current().drain.finish


async def talk(stream: anyio.abc.SocketStream | trio.SocketStream) -> None:
    await stream.aclose()
    while not over:
        await anyio.sleep(0.01)
    await anyio.sleep(0.1)  # `serve` has learnt it by then
    os.kill(os.getpid(), signal.SIGTERM)
    await anyio.sleep(0.1)
    print("finished", flush=True)


async def main() -> None:
    async with Listener() as listener:
        await listener.serve(talk)


def finished() -> None:
    finish()
    over.append(True)


current().drain.finish = finished  # type: ignore[method-assign]
if sys.argv[1] == "trio":
    trio.run(serve, talk)
else:
    anyio.run(main)
