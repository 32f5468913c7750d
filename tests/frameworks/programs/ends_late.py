"""A handler that still works after it has closed its stream, until the drain is over."""

from __future__ import annotations

import signal
import sys

import anyio
import trio
from socketprotector_client.anyio import Listener
from socketprotector_client.trio import serve


async def talk(stream: anyio.abc.SocketStream | trio.SocketStream) -> None:
    await stream.aclose()
    # The library handles the signal until the last connection is closed.
    while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        await anyio.sleep(0.01)
    print("finished", flush=True)


async def main() -> None:
    async with Listener() as listener:
        await listener.serve(talk)


if sys.argv[1] == "trio":
    trio.run(serve, talk)
else:
    anyio.run(main)
