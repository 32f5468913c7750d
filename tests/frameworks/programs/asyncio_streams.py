"""asyncio's own streams."""

from __future__ import annotations

import asyncio
import sys

from socketprotector_client import Listener

from tests.frameworks.programs.pages import answer


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    last = False
    while not last:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            break
        response, last = await asyncio.to_thread(answer, request)
        writer.write(response)
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(talk, sock=Listener(sys.argv[1]))
    await server.serve_forever()


asyncio.run(main())
