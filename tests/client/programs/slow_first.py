"""asyncio: says how many connections had been accepted when the first handler ran."""

from __future__ import annotations

import asyncio
import sys

from socketprotector_client import Connection, Listener, aserve

from tests.client.programs.talk import answer, say

accepted = 0


class Counting(Listener):
    def accept(self) -> tuple[Connection, object]:
        global accepted
        found = super().accept()
        accepted += 1
        return found


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    say(f"handler at {accepted}")
    async for line in reader:
        writer.write((answer(line.decode().rstrip("\n"), writer) + "\n").encode())
    writer.close()


async def main() -> None:
    if sys.argv[1] == "aserve":
        await aserve(talk)
    else:
        server = await asyncio.start_server(talk, sock=Counting(take=int(sys.argv[2])))
        await server.serve_forever()


asyncio.run(main())
