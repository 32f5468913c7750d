"""`socketprotectorctl` and `python -m socketprotector.ctl`.

main() imports the program late, so that a lack of memory ends in a one-line error.
"""

from __future__ import annotations

import os
import sys

from ..model.errors import lack_of_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_STATUS = 1  # cli.OutputFailed's


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default the one in the process's arguments.  Returns the exit status."""
    try:
        from . import main as program

        return program.main(arguments)
    except (MemoryError, ImportError) as error:  # `ulimit -v`
        lack = lack_of_memory(error)
        if not lack:
            raise  # the installation is incomplete
        os.write(2, f"socketprotectorctl: {lack}\n".encode())
        os._exit(_STATUS)


if __name__ == "__main__":
    sys.exit(main())
