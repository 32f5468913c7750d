"""Becomes the user nobody before it says that it is ready."""

import os

from plain import answer, say, take

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
say(b"READY=1")
while taken := take():
    with taken[1] as client:
        answer(client)
