"""`socketprotectorctl` and `python -m socketprotector.ctl`.

If memory is short, or if files of this package are missing or broken, the import of ctl/main.py
fails.  So the import is inside main(), which reports the failure in one line.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

try:
    from ..model.errors import lack_of_memory
except Exception:  # broken, too

    def lack_of_memory(error: MemoryError | ImportError) -> str:
        """Stand in for the function of model/errors.py."""
        return "out of memory" if isinstance(error, MemoryError) else ""


_CANNOT_RUN = 1  # equals cli.OutputFailed.status; without memory, main() cannot import cli
_NEW_VERSION_FAILED = 3  # equals errors.NewVersionFailed.status
_INTERRUPTED = 130  # equals main.INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.  arguments: if None, sys.argv[1:]."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        from . import main as program
    except KeyboardInterrupt:  # later, main.py handles it
        return _INTERRUPTED
    except (Exception, SystemExit) as error:
        _fail(error, words)
    try:
        return program.main(arguments)
    except (MemoryError, ImportError, SyntaxError) as error:  # from a module of one command
        _fail(error, words)


def _fail(error: BaseException, words: Sequence[str]) -> NoReturn:
    """Exit, because the program cannot be loaded.

    A protector could not start from this installation either.  So if the command is `upgrade`, exit
    as if the new version had failed.
    """
    lack = lack_of_memory(error) if isinstance(error, MemoryError | ImportError) else ""
    status = _NEW_VERSION_FAILED if "upgrade" in words and not lack else _CANNOT_RUN
    what = " ".join(f"{type(error).__name__}: {error}".split())
    why = lack or f"this installation of SocketProtector is broken ({what}); install it again"
    os.write(2, f"socketprotectorctl: {why}\n".encode(errors="replace"))
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
