"""aserve(), with asyncio streams."""

from __future__ import annotations

import asyncio

from socketprotector_client import aserve

from tests.client.programs.talk import answer, options, say


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write((answer(line.decode().rstrip("\n"), writer) + "\n").encode())
        await writer.drain()


chosen = options()
asyncio.run(aserve(talk, chosen.address, limit=chosen.limit))
say("ended")
