"""The signals that the protector handles, and their delivery as bytes in a pipe.

The reader of the pipe acts on a signal; a handler never does.

Source: signal.set_wakeup_fd; the self-pipe trick.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself would cost the guard a megabyte
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

STOPS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
#: The other signals of operators.  The resident process begins with all of them blocked.
REQUESTS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU)
#: The signals that daemon/supervisor.py handles, and that the guard passes on.
TO_THE_PROTECTOR = (*STOPS, *REQUESTS)


def catch(numbers: Iterable[int]) -> int:
    """Write each of these signals as a byte to a pipe; return the pipe's read end."""
    receive, send = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, _is_in_the_pipe)
    return receive


def block() -> None:
    """Block these signals while this process ends, so that no signal changes its exit status.

    Call this last: Python restores the default effect of each signal as it ends, and a signal
    would then become the exit status.  Source: CPython's _PySignal_Fini.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_PROTECTOR)


def _is_in_the_pipe(number: int, frame: object) -> None:
    """Do nothing: without a handler the signal would have its default effect."""
