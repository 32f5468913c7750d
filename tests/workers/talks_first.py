"""Says a hundred STATUS lines and READY=1 while the protector stands still; then `[pid] line`."""

import os
import signal

from socketprotector_client import connections, notify

MESSAGES = 100
protector = os.getppid()
os.kill(protector, signal.SIGSTOP)
try:
    for number in range(MESSAGES):
        notify(status=f"{number} of {MESSAGES}")
    clients = connections()
finally:
    os.kill(protector, signal.SIGCONT)
for client, _ in clients:
    with client, client.makefile("rb") as lines:
        for line in lines:
            client.sendall(b"[%d] %s" % (os.getpid(), line))
