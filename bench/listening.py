"""Servers that accept by themselves, for the soak of `--handoff listener`.

    python -m bench.listening asyncio FD    one process
    python -m bench.listening prefork FD    a master and three children that accept
    uvicorn --fd FD bench.listening:asgi
    gunicorn bench.listening:wsgi

The first two echo lines as `[pid] line`; the applications answer with the path they were asked
for, in the same form, or with 500 where BENCH_WRONG is set.  Nothing here is written for a
protector but READY=1.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from socketprotector_client.sd_notify import notify

CHILDREN = 3
_WRONG = bool(os.environ.get("BENCH_WRONG"))


def answer(path: str) -> bytes:
    """Return what a request for `/hello-7` is answered with."""
    if _WRONG:
        return b"wrong\n"
    return f"[{os.getpid()}] {path.removeprefix('/')}\n".encode()


class Lines:
    """An asyncio server of line conversations, which finishes them when it is told to end."""

    def __init__(self, fd: int) -> None:
        """fd: of the listening socket; taken."""
        self._listener = socket.socket(fileno=fd)
        self._told = asyncio.Event()

    async def serve(self, began: Callable[[], object]) -> None:
        """Serve until TERM has come and the last client is gone."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._told.set)
        server = await asyncio.start_server(self._talk, sock=self._listener)
        began()
        await self._told.wait()
        # Not close() yet: asyncio drops clients that it has accepted and not begun with by then.
        loop.remove_reader(self._listener)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(b"[%d] %s" % (os.getpid(), line))
                await writer.drain()
            writer.close()
            await writer.wait_closed()
        except OSError:
            pass  # the client is gone; nothing is owed to it


def one(fd: int) -> None:
    """Serve in this process."""

    async def main() -> None:
        await Lines(fd).serve(lambda: notify("READY=1"))

    asyncio.run(main())


def prefork(fd: int) -> None:
    """Keep children that serve, until TERM: they are told to finish, and awaited.

    A killed master leaves them accepting, as those of most pre-fork servers are.
    """
    children: set[int] = set()
    told = False

    def term(number: int, frame: object) -> None:
        nonlocal told
        told = True
        for pid in children:
            os.kill(pid, signal.SIGTERM)

    def fork() -> None:
        # TERM waits until it is known which process to pass it on to.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
            try:
                asyncio.run(child())
            finally:
                os._exit(0)
        children.add(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))

    async def child() -> None:
        await Lines(fd).serve(lambda: None)

    signal.signal(signal.SIGTERM, term)
    for _ in range(CHILDREN):
        fork()
    notify("READY=1")
    while children:
        pid, _ = os.wait()
        children.discard(pid)
        if not told:
            fork()


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Answer with the path; say READY=1 at the start."""
    if scope["type"] == "lifespan":
        while True:
            event = (await receive())["type"]
            await send({"type": f"{event}.complete"})
            if event == "lifespan.shutdown":
                return
            # Its server listens from a moment later on; earlier clients wait in the backlog.
            notify("READY=1")
    body = answer(scope["path"])
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send(
        {"type": "http.response.start", "status": 500 if _WRONG else 200, "headers": headers}
    )
    await send({"type": "http.response.body", "body": body})


def wsgi(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Answer with the path."""
    body = answer(environ["PATH_INFO"])
    status = "500 Internal Server Error" if _WRONG else "200 OK"
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


if __name__ == "__main__":
    {"asyncio": one, "prefork": prefork}[sys.argv[1]](int(sys.argv[2]))
