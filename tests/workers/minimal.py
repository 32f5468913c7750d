"""A worker that uses nothing but what docs/protocol.md says: no client library."""

import os
import socket
import sys

address = os.environ["NOTIFY_SOCKET"]
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)
channel = socket.socket(fileno=int(os.environ["SOCKETPROTECTOR_CHANNEL"]))
while True:
    header, control, _, _ = channel.recvmsg(16, socket.CMSG_LEN(4))
    if not header:
        sys.exit(0)
    with socket.socket(fileno=int.from_bytes(control[0][2], sys.byteorder)) as client:
        while data := client.recv(65536):
            client.sendall(data)
