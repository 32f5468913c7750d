"""The application of sockets.py on uvicorn with a plain Listener, without socketprotector-run."""

from __future__ import annotations

import uvicorn
from socketprotector_client import Listener

from tests.frameworks.programs.sockets import app

config = uvicorn.Config(app, loop="asyncio", lifespan="off", ws="wsproto", log_level="warning")
uvicorn.Server(config).run(sockets=[Listener("127.0.0.1:0")])
