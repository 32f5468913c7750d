"""A loop of its own on the Channel, without a layer in between."""

from __future__ import annotations

import select
import socket

from socketprotector_client import Channel, Drained, ready

from tests.client.programs.talk import say

channel = Channel.from_environment()
assert channel is not None
epoll = select.epoll()
epoll.register(channel, select.EPOLLIN)
clients: dict[int, socket.socket] = {}
ready()
taking = True
while taking or clients:
    for fd, _ in epoll.poll():
        if fd in clients:
            data = clients[fd].recv(65536)
            clients[fd].sendall(data)
            if not data:
                epoll.unregister(fd)
                clients.pop(fd).close()
            continue
        try:
            taken = channel.take()
        except Drained:
            epoll.unregister(channel)
            taking = False
            continue
        if taken is not None:
            fd, listener, _ = taken
            family = channel.families[listener]
            assert family is not None
            clients[fd] = socket.socket(family, socket.SOCK_STREAM, 0, fd)
            epoll.register(fd, select.EPOLLIN)
channel.close()
say("ended")
