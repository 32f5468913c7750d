"""uvicorn on the loop of asyncio."""

from __future__ import annotations

import sys

import uvicorn
from socketprotector_client import Listener

from tests.frameworks.programs.pages import asgi

config = uvicorn.Config(asgi, loop="asyncio", lifespan="off", http="h11", ws="none")
uvicorn.Server(config).run(sockets=[Listener(sys.argv[1])])
