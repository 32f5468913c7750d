"""A Listener in a server that does not know about SIGTERM, in the main thread or not."""

from __future__ import annotations

import asyncio
import atexit
import socketserver
import sys
import threading

from socketprotector_client import Listener

from tests.client.programs.talk import answer, say, talk


class Talk(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        talk(self.request)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.close()
        self.socket = Listener()
        super().server_bind()


async def talk_async(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write((answer(line.decode().rstrip("\n"), writer) + "\n").encode())
    writer.close()


async def serve_async() -> None:
    server = await asyncio.start_server(talk_async, sock=Listener())
    await server.serve_forever()


def serve_in_thread() -> threading.Thread:
    server = Server(("", 0), Talk)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    return thread


atexit.register(say, "cleaned up")
if sys.argv[1] == "asyncio":
    asyncio.run(serve_async())
elif sys.argv[1] == "thread":
    serve_in_thread().join()
elif sys.argv[1] == "waiting main thread":
    serve_in_thread()
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say("interrupted")
