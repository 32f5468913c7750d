"""hypercorn, which asks its configuration for sockets."""

from __future__ import annotations

import asyncio
import sys

from hypercorn.asyncio import serve
from hypercorn.config import Config, Sockets
from socketprotector_client import Listener

from tests.frameworks.programs.pages import asgi


class OnListener(Config):
    def create_sockets(self) -> Sockets:
        return Sockets([], [Listener(sys.argv[1])], [])


asyncio.run(serve(asgi, OnListener()))  # type: ignore[arg-type]
