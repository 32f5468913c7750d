"""stumbles.py FLAG stop|kill WAY: the first that is woken after FLAG is there never takes.

It removes FLAG, says `stumbles=PID`, and is stopped or killed right before it would have taken.
WAY: connections, serve, listener (asyncio's server), aserve; or stdio, which is a pool of programs.
"""

import asyncio
import os
import signal
import sys
from typing import Any

from socketprotector_client import Listener, aserve, connections, serve
from socketprotector_client.channel import Channel

flag, end, way, *rest = sys.argv[1:]
said = b"[%d] served\n" % os.getpid()


def stumble() -> None:
    try:
        os.unlink(flag)
    except FileNotFoundError:
        return
    os.write(2, b"stumbles=%d\n" % os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP if end == "stop" else signal.SIGKILL)


def answer(client: Any, peer: object) -> None:
    with client:
        client.send(said)


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(said)
    writer.close()


async def listen() -> None:
    await (await asyncio.start_server(stream, sock=Listener())).serve_forever()


take = Channel.take


def take_or_stumble(channel: Channel) -> Any:
    stumble()
    return take(channel)


Channel.take = take_or_stumble  # type: ignore[assignment, method-assign]
if way == "connections":
    for client, peer in connections():
        answer(client, peer)
elif way == "serve":
    serve(answer, threads=1)
elif way == "aserve":
    asyncio.run(aserve(stream))
elif way == "listener":
    asyncio.run(listen())
else:
    from socketprotector.programs.stdio import __main__ as stdio
    from socketprotector.programs.stdio.pool import Pool

    pool_take = Pool._take

    def pool_take_or_stumble(pool: Pool) -> None:
        stumble()
        pool_take(pool)

    Pool._take = pool_take_or_stumble  # type: ignore[assignment, method-assign]
    stdio.run(rest)
