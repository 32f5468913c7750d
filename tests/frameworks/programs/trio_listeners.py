"""trio's own serve_listeners, which never returns by itself."""

from __future__ import annotations

import sys

import trio
from socketprotector_client.trio import Listener

from tests.frameworks.programs.trio_streams import talk


async def main() -> None:
    try:
        await trio.serve_listeners(talk, [Listener(sys.argv[1])])
    except BaseExceptionGroup as group:
        if group.split(trio.EndOfChannel)[1] is not None:
            raise


trio.run(main)
