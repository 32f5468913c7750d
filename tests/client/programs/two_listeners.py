"""Two servers of asyncio, each on a Listener with room for one; `handles`: SIGTERM ends both.

two_listeners.py ADDRESS ADDRESS [handles]
"""

from __future__ import annotations

import asyncio
import signal
import sys

from socketprotector_client import Listener

from tests.client.programs.talk import answer, say


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write((answer(line.decode().rstrip("\n"), writer) + "\n").encode())
        await writer.drain()
    writer.close()


async def main() -> None:
    terms: list[int] = []
    stop = asyncio.Event()
    if sys.argv[3:] == ["handles"]:

        def end() -> None:
            terms.append(signal.SIGTERM)
            stop.set()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
    for address in sys.argv[1:3]:
        await asyncio.start_server(talk, sock=Listener(address, limit=1))
    await stop.wait()
    say(f"SIGTERM: {len(terms)}")


asyncio.run(main())
