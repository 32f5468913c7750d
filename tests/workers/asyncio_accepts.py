"""An unmodified asyncio server on the listeners that LISTEN_FDS names: `[pid] line` for a line.

TERM: no more accepting, an answer to who has asked, exit.
"""

import asyncio
import os
import signal
import socket


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(b"[%d] %s" % (os.getpid(), line))
        await writer.drain()
    writer.close()


async def main() -> None:
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    count = int(os.environ["LISTEN_FDS"])
    sockets = [socket.socket(fileno=fd) for fd in range(3, 3 + count)]
    serve = [
        asyncio.start_unix_server if each.family == socket.AF_UNIX else asyncio.start_server
        for each in sockets
    ]
    servers = [await start(handle, sock=each) for start, each in zip(serve, sockets, strict=True)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
    await told.wait()
    for each in servers:
        each.close()
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0.01)


asyncio.run(main())
