"""An asyncio server on the client library's drop-in listener: `[pid] line` for each line.

With a FIFO's path the first handler holds the whole process up until that has been opened.
"""

import asyncio
import os
import sys

from socketprotector_client import Listener

gates = sys.argv[1:]


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while gates:
        os.write(2, b"waiting\n")
        os.open(gates.pop(), os.O_RDONLY)
    while line := await reader.readline():
        writer.write(b"[%d] %s" % (os.getpid(), line))
        await writer.drain()
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(handle, sock=Listener())
    async with server:
        await server.serve_forever()


asyncio.run(main())
