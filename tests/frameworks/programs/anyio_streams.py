"""anyio's streams, on the loop that is named."""

from __future__ import annotations

import sys

import anyio
import anyio.abc
import anyio.to_thread
from socketprotector_client.anyio import Listener

from tests.frameworks.programs.pages import answer


async def talk(stream: anyio.abc.SocketStream) -> None:
    request = b""
    async for data in stream:
        request += data
        if request.endswith(b"\r\n\r\n"):
            response, last = await anyio.to_thread.run_sync(answer, request)
            await stream.send(response)
            if last:
                return
            request = b""


async def main() -> None:
    async with Listener(sys.argv[1]) as listener:
        await listener.serve(talk)


anyio.run(main, backend=sys.argv[2])
