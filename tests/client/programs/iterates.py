"""connections(), a thread for each."""

from __future__ import annotations

import threading

from socketprotector_client import connections

from tests.client.programs.talk import options, say, talk

chosen = options()
threads = []
for connection, _ in connections(chosen.address, limit=chosen.limit):
    threads.append(threading.Thread(target=talk, args=(connection,)))
    threads[-1].start()
say("no more")
for thread in threads:
    thread.join()
say("ended")
