"""A thread, or a forked child, that first uses the library while another thread does."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping

from socketprotector_client import draining
from socketprotector_client.worker import Worker

from tests.client.programs.talk import say

made: list[Worker] = []
initialize = Worker.__init__


def slowly(self: Worker, environ: Mapping[str, str]) -> None:
    made.append(self)
    if self is made[0]:
        other.start()
        other.join(0.1)  # it ends only if it does not wait for this Worker
    initialize(self, environ)


def fork() -> None:
    pid = os.fork()
    if not pid:
        use()
        os._exit(0)
    os.waitpid(pid, 0)


def use() -> None:
    draining()
    say(f"made: {len(made)}")


Worker.__init__ = slowly  # type: ignore[method-assign]
other = threading.Thread(target=fork if sys.argv[1:] == ["fork"] else use)
draining()
other.join()
say("ended")
