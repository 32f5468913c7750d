"""An asyncio server on the client library's drop-in listener: `[pid] line` for each line."""

import asyncio
import os

from socketprotector_client import Listener


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(b"[%d] %s" % (os.getpid(), line))
        await writer.drain()
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(handle, sock=Listener())
    async with server:
        await server.serve_forever()


asyncio.run(main())
