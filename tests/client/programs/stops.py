"""A Listener that is told by a signal's handler to stop; ends after its last connection."""

from __future__ import annotations

import select
import signal

from socketprotector_client import Listener, draining

from tests.client.programs.talk import say


def readable(timeout_s: float | None) -> bool:
    return bool(select.select([listener], [], [], timeout_s)[0])


def accepts() -> bool:
    try:
        listener.accept()
    except BlockingIOError:
        return False
    return True


listener = Listener()
listener.setblocking(False)
listener.listen()
readable(None)
connection, _ = listener.accept()
assert not accepts()  # as loops do until nothing is left
signal.signal(signal.SIGUSR1, lambda *_: listener.stop_accepting())
say("taken")
readable(None)  # no client comes any more: it is the signal
assert not accepts()
say("drains" if draining() else "goes on")
say("spins" if readable(0) else "sleeps")
connection.recv(1)
connection.close()
readable(None)
listener.accept()
