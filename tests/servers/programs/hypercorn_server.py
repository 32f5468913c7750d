"""hypercorn that reads what it has accepted before it leaves.  Usage: hypercorn_server.py FD"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any, cast

from asgi_app import app
from hypercorn.asyncio import serve
from hypercorn.config import Config

GRACE_S = 1.0  # for requests that are on their way in connections that were accepted already


async def main(fd: int) -> None:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, told.set)

    async def leave() -> None:
        await told.wait()
        loop.remove_reader(fd)
        await asyncio.sleep(GRACE_S)

    config = Config()
    config.bind = [f"fd://{fd}"]
    await serve(cast(Any, app), config, shutdown_trigger=leave)


asyncio.run(main(int(sys.argv[1])))
