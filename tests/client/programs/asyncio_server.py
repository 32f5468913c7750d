"""asyncio's own server on a Listener; it handles SIGTERM as servers do."""

from __future__ import annotations

import asyncio
import signal

from socketprotector_client import Listener

from tests.client.programs.talk import answer, options, say

clients: set[asyncio.Task[None]] = set()


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write((answer(line.decode().rstrip("\n"), writer) + "\n").encode())
        await writer.drain()
    writer.close()


def start(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    task = asyncio.get_running_loop().create_task(talk(reader, writer))
    clients.add(task)
    task.add_done_callback(clients.discard)


async def main() -> None:
    chosen = options()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = await asyncio.start_server(start, sock=Listener(chosen.address, limit=chosen.limit))
    await stop.wait()
    server.close()
    while clients:
        await asyncio.wait(clients)


asyncio.run(main())
say("ended")
