"""`socketprotector-exporter` and `python -m socketprotector.exporter`.

The program is loaded by a function, so that one line says where there is no memory to load it.
"""

from __future__ import annotations

import os
import sys

from ..model.errors import lack_of_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_STATUS = 111  # errors.SystemRefused's


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until it is stopped.  Returns the exit status.

    arguments: of the command line; the process's own by default.
    """
    try:
        from . import main as program

        return program.main(arguments)
    except (MemoryError, ImportError) as error:  # `ulimit -v`
        lack = lack_of_memory(error)
        if not lack:
            raise  # the installation is incomplete
        os.write(2, f"socketprotector-exporter: {lack}\n".encode())
        os._exit(_STATUS)


if __name__ == "__main__":
    sys.exit(main())
