"""`socketprotector-exporter` and `python -m socketprotector_exporter`.

main() imports the program, so that a lack of memory gives a one-line error.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_STATUS = 111  # SystemRefused's
_FREE_MEMORY = "raise the limit (ulimit -v, LimitAS= of a unit), or free some"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until TERM or INT ends the process; return the exit status of a failed start, or of help.

    arguments: the words of the command line; None: the process's own.
    """
    # Signals that come during the import wait for the thread of ending.py.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        from . import main as program

        return program.main(arguments)
    except (MemoryError, ImportError) as error:  # `ulimit -v`
        if isinstance(error, ImportError) and ".so" not in str(error):
            raise  # the installation is incomplete
        lack = f"out of memory ({error})".removesuffix(" ()")
        os.write(2, f"socketprotector-exporter: {lack}: {_FREE_MEMORY}\n".encode())
        os._exit(_STATUS)


if __name__ == "__main__":
    sys.exit(main())
