"""`socketprotectorctl` and `python -m socketprotector.ctl`.

If memory is short, the import of ctl/main.py fails.  So the import is inside main(), which reports
the failure in one line.
"""

from __future__ import annotations

import os
import sys

from ..model.errors import lack_of_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_NO_MEMORY_STATUS = 1  # equals cli.OutputFailed.status; without memory, main() cannot import cli
_INTERRUPTED = 130  # equals main.INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.  arguments: if None, sys.argv[1:]."""
    try:
        from . import main as program

        return program.main(arguments)
    except (MemoryError, ImportError) as error:  # for example under `ulimit -v`
        lack = lack_of_memory(error)
        if not lack:
            raise  # an ImportError for another reason: the installation is incomplete
        os.write(2, f"socketprotectorctl: {lack}\n".encode())
        os._exit(_NO_MEMORY_STATUS)
    except KeyboardInterrupt:  # during the import; later, main.py handles it
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
