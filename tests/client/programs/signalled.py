"""Has a SIGTERM handler of its own, or is not the main thread: TERM is not ours to take."""

from __future__ import annotations

import signal
import sys
import threading

from socketprotector_client import connections, draining, serve

from tests.client.programs.talk import say, talk

if sys.argv[1] == "own handler":
    signal.signal(signal.SIGTERM, lambda *_: say(f"own handler, draining {draining()}"))
    serve(talk)
elif sys.argv[1] == "restored":
    serve(talk)
    say(f"{signal.getsignal(signal.SIGTERM)!r} {signal.set_wakeup_fd(-1)}")
elif sys.argv[1] == "restored by break":
    for connection, _ in connections():
        talk(connection)
        break
    say(f"{signal.getsignal(signal.SIGTERM)!r} {signal.set_wakeup_fd(-1)}")
elif sys.argv[1] == "thread":
    thread = threading.Thread(target=serve, args=(talk,))
    thread.start()
    thread.join()
    say(f"{signal.getsignal(signal.SIGTERM)!r} {draining()}")
elif sys.argv[1] == "noisy":
    # A signal now and then that has nothing to do with us.
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    serve(talk)
    signal.setitimer(signal.ITIMER_REAL, 0)
    say("ended")
