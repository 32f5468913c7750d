"""trio's streams."""

from __future__ import annotations

import sys

import trio
from socketprotector_client.trio import serve

from tests.frameworks.programs.pages import answer


async def talk(stream: trio.SocketStream) -> None:
    request = b""
    async for data in stream:
        request += data
        if request.endswith(b"\r\n\r\n"):
            response, last = await trio.to_thread.run_sync(answer, request)
            await stream.send_all(response)
            if last:
                return
            request = b""


if __name__ == "__main__":
    trio.run(serve, talk, sys.argv[1])
