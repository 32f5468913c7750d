"""Answers each line with the listener's index and address; `peer` with the client's address."""

import os
import struct

from plain import say, take

listeners = os.environ["SOCKETPROTECTOR_LISTENERS"].split(" ")
say(b"READY=1")
while taken := take():
    header, client = taken
    index = struct.unpack("<BBHIQ", header)[2]
    with client:
        while data := client.recv(65536):
            if data == b"peer\n":
                client.sendall("{} {}\n".format(*client.getpeername()).encode())
            else:
                client.sendall(f"{index} {listeners[index]} {data.decode()}".encode())
