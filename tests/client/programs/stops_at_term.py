"""A Listener whose program stops accepting at the first SIGTERM, and ends at the second."""

from __future__ import annotations

import signal
import sys
from typing import Any

from socketprotector_client import Listener

from tests.client.programs.talk import say

signals = 0


def told(*_: Any) -> None:
    global signals
    signals += 1
    if signals == 1:
        listener.stop_accepting()
    else:
        sys.exit(0)


listener = Listener()
signal.signal(signal.SIGTERM, told)
listener.listen()
connection, _ = listener.accept()
say("taken")
connection.close()
listener.accept()
