"""The signals that the protector handles, and signals as bytes in a pipe.

What a signal means is decided where the pipe is read, never in a handler.

Source: signal.set_wakeup_fd; the self-pipe trick.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself would cost the guard a megabyte
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

STOPS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
#: The others that operators send.  The launching process blocks them for the resident one.
REQUESTS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU)
#: What daemon/supervisor.py handles, and the guard passes on to it.
TO_THE_PROTECTOR = (*STOPS, *REQUESTS)


def catch(numbers: Iterable[int]) -> int:
    """Write each of these signals as a byte to a pipe; return the pipe's read end."""
    receive, send = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, _is_in_the_pipe)
    return receive


def block() -> None:
    """Block the signals while this process ends, so that none decides its exit status.

    Call this last: Python restores the default effect of each signal as it ends, and a signal
    would then become the exit status.  Source: CPython's _PySignal_Fini.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_PROTECTOR)


def _is_in_the_pipe(number: int, frame: object) -> None:
    """Do nothing: without a handler the signal would have its default effect."""
