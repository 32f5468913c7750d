"""prefork.py CHILDREN: accepts by a Listener, as do its children; one line a connection."""

import os
import sys

from socketprotector_client import Listener

listener = Listener()
listener.listen()
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        break
while True:
    client, _ = listener.accept()
    with client, client.makefile("rb") as lines:
        client.sendall(b"[%d] %s" % (os.getpid(), lines.readline()))
