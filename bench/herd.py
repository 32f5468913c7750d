"""A worker that is woken, answers and closes: how many of its like wake for one connection?

    herd.py connections   by connections(); serve, aserve, listener (asyncio's server on a Listener)
                          and blocking (accept() of a Listener) likewise
    herd.py gevent        likewise trio, anyio (on asyncio), anyio-trio, waitress, gunicorn, gthread
    herd.py every         from the channel by an epoll that has all woken, as it was
    herd.py nested        from an epoll within another that has one woken: it does not pass through

It speaks first, so that whatever it sleeps in is the wait for the next connection, and is busy for
as many milliseconds as the second word says, asleep.  `hold`, the third: one connection at once is
its limit, and it is kept.
"""

from __future__ import annotations

import asyncio
import os
import select
import sys
import time
from typing import Any

from socketprotector_client import Channel, Drained, Listener, aserve, connections, ready, serve

_MODE, _BUSY_S = sys.argv[1], float(sys.argv[2]) / 1e3
_LIMIT = 1 if sys.argv[3:] == ["hold"] else None
_SAID = b"[%d] served\n" % os.getpid()
_kept: list[Any] = []


def _answer(client: Any, peer: object = None) -> None:
    if _BUSY_S:
        time.sleep(_BUSY_S)
    client.send(_SAID)
    if _LIMIT:
        _kept.append(client)
    else:
        client.close()


async def _stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if _BUSY_S:
        await asyncio.sleep(_BUSY_S)
    writer.write(_SAID)
    if _LIMIT:
        await asyncio.Event().wait()
    else:
        writer.close()


async def _listen() -> None:
    server = await asyncio.start_server(_stream, sock=Listener(limit=_LIMIT))
    await server.serve_forever()


def _by_hand(channel: Channel, *, nested: bool) -> None:
    outer = epoll = select.epoll()
    if nested:
        epoll = select.epoll()
        outer.register(epoll.fileno(), select.EPOLLIN)
    epoll.register(channel, select.EPOLLIN | (select.EPOLLEXCLUSIVE if nested else 0))
    ready()
    while True:
        outer.poll()
        try:
            taken = channel.take()
        except Drained:
            return
        if taken is not None:
            os.write(taken[0], _SAID)
            os.close(taken[0])


def _wsgi(environ: Any, start_response: Any) -> list[bytes]:
    if _BUSY_S:
        time.sleep(_BUSY_S)
    start_response("200 OK", [("Content-Length", str(len(_SAID)))])
    return [_SAID]


def _on_gunicorn(worker_class: str) -> None:
    # So many processes of its own as there are to be workers.
    options = ["-w", os.environ["HERD_PROCESSES"], "-k", worker_class, "--threads", "1"]
    os.execv(
        sys.executable,
        [
            *(sys.executable, "-m", "gunicorn", "-c", "python:socketprotector_client.gunicorn"),
            *(
                *options,
                "--no-control-socket",
                "--keep-alive",
                "0",
                "-b",
                "127.0.0.1:1",
            ),  # which is not bound
            *("--pythonpath", os.path.dirname(__file__), "herd_wsgi:application"),
        ],
    )


def _framework() -> None:
    if _MODE == "gevent":
        from gevent.server import StreamServer
        from socketprotector_client.gevent import Listener as GeventListener

        StreamServer(GeventListener(limit=_LIMIT), _answer).serve_forever()
    elif _MODE == "trio":
        import trio
        from socketprotector_client.trio import serve as trio_serve

        trio.run(lambda: trio_serve(_say, limit=_LIMIT))
    elif _MODE.startswith("anyio"):
        import anyio
        from socketprotector_client.anyio import Listener as AnyioListener

        async def serve_anyio() -> None:
            await AnyioListener(limit=_LIMIT).serve(_say)

        anyio.run(serve_anyio, backend=_MODE.partition("-")[2] or "asyncio")
    elif _MODE == "waitress":
        from socketprotector_client.waitress import serve as waitress_serve

        waitress_serve(_wsgi, threads=1)
    else:
        _on_gunicorn({"gunicorn": "sync"}.get(_MODE, _MODE))


async def _say(stream: Any) -> None:
    await (getattr(stream, "send_all", None) or stream.send)(_SAID)


if _MODE == "connections":
    for client, _ in connections(limit=_LIMIT):
        _answer(client)
elif _MODE == "serve":
    serve(_answer)
elif _MODE == "aserve":
    asyncio.run(aserve(_stream, limit=_LIMIT))
elif _MODE == "listener":
    asyncio.run(_listen())
elif _MODE == "blocking":
    listener = Listener(limit=_LIMIT)
    while True:
        _answer(listener.accept()[0])
elif _MODE not in ("every", "nested"):
    _framework()
else:
    channel = Channel.from_environment()
    if channel is None:
        raise SystemExit("there is no protector")
    _by_hand(channel, nested=_MODE == "nested")
