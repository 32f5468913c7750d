"""An asyncio server that knows nothing of us but LISTEN_FDS: `[pid] line` for each line.

TERM: no more accepting; who is connected is served on.
"""

import asyncio
import os
import signal
import socket


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            writer.write(b"[%d] %s" % (os.getpid(), line))
            await writer.drain()
    finally:
        open_ones.discard(writer)
        writer.close()


open_ones: set[asyncio.StreamWriter] = set()


async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    open_ones.add(writer)
    await handle(reader, writer)


async def main() -> None:
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    listeners = [socket.socket(fileno=3 + n) for n in range(int(os.environ["LISTEN_FDS"]))]
    servers = [await asyncio.start_server(accepted, sock=each) for each in listeners]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
    await told.wait()
    for server in servers:
        server.close()
    while open_ones:
        await asyncio.sleep(0.1)


asyncio.run(main())
