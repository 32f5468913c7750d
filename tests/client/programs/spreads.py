"""Echoes lines; at a client's end it says to it whether its turn had come.

threads: serve().  tasks: aserve().  server: asyncio's own, on a Listener.  loop: connections(), a
thread for each.  fork: the first client is held while a child takes another one.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from contextlib import suppress

from socketprotector_client import Connection, Listener, aserve, connections, draining, serve

from tests.client.programs.talk import say


def talk(connection: Connection, peer: object = None) -> None:
    with connection, connection.makefile("rb") as lines:
        for line in lines:
            if line == b"drains?\n":
                line = b"%d %d\n" % (draining(), draining(connection))
            connection.sendall(line)
        connection.sendall(b"your turn\n" if draining(connection) else b"you left\n")


async def talk_in_task(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write(line)
    writer.write(b"your turn\n" if draining(writer) else b"you left\n")


async def talk_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await talk_in_task(reader, writer)
    writer.close()


async def serve_on_listener() -> None:
    server = await asyncio.start_server(talk_and_close, sock=Listener())
    await server.serve_forever()


if sys.argv[1] == "threads":
    serve(talk, threads=int(sys.argv[2]))
elif sys.argv[1] == "tasks":
    asyncio.run(aserve(talk_in_task))
elif sys.argv[1] == "server":
    with suppress(SystemExit):
        asyncio.run(serve_on_listener())
elif sys.argv[1] == "loop":
    for client, _ in connections():
        threading.Thread(target=talk, args=(client,)).start()
elif sys.argv[1] == "fork":
    shared = Listener()
    shared.listen()
    held, _ = shared.accept()
    child = os.fork()
    if not child:
        held.close()
        client, _ = shared.accept()
        talk(client)
        os._exit(0)
    say(f"child {child}")
    os.waitpid(child, 0)
    say("child ended")
    talk(held)
say("ended")
