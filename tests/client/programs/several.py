"""Two calls of the same function serve."""

from __future__ import annotations

import asyncio
import sys
import threading

from socketprotector_client import aserve, connections, serve

from tests.client.programs.talk import answer, say, talk


async def talk_later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write((answer(line.decode().rstrip("\n"), writer) + "\n").encode())
        await writer.drain()


async def both() -> None:
    await asyncio.gather(aserve(talk_later, limit=1), aserve(talk_later, limit=1))


def one() -> None:
    if sys.argv[1] == "serve":
        serve(talk, threads=2, limit=2)
    elif sys.argv[1] == "serve-one":
        serve(talk, threads=2, limit=1)
    else:
        for connection, _ in connections(limit=1):
            talk(connection)
            del connection


if sys.argv[1] == "aserve":
    asyncio.run(both())
else:
    other = threading.Thread(target=one)
    other.start()
    one()
    other.join()
say("ended")
