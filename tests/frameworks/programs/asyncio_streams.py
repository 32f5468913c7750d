"""asyncio's own streams."""

from __future__ import annotations

import asyncio
import sys

from socketprotector_client import Listener, draining

from tests.frameworks.programs.pages import answer, wants_close


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    close = False
    while not close:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            break
        close = wants_close(request)
        response = await asyncio.to_thread(answer, request, close=draining())
        writer.write(response)
        close = close or draining()
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(talk, sock=Listener(sys.argv[1]))
    await server.serve_forever()


asyncio.run(main())
