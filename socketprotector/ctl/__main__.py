"""`socketprotectorctl` and `python -m socketprotector.ctl`.

If memory is short, or if files of this package are missing or broken, the import of ctl/main.py
fails.  So _load() imports it, and main() reports the failure in one line.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

try:
    from ..model.errors import lack_of_memory
except Exception:  # errors.py may be broken as well

    def lack_of_memory(error: BaseException) -> str:
        """Stand in for the function of model/errors.py."""
        return "out of memory" if isinstance(error, MemoryError) else ""


_NO_MEMORY_STATUS = 1  # equals cli.OutputFailed.status; without memory, main() cannot import cli
_BROKEN_STATUS = 3  # equals errors.NewVersionFailed.status, for `upgrade --check`
_INTERRUPTED = 130  # equals main.INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.  arguments: if None, sys.argv[1:].

    If memory is short, or files of this package are missing or broken, exit.
    """
    try:
        run = _load()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (Exception, SystemExit) as error:
        _fail(error)
    try:
        return run(arguments)
    except (MemoryError, ImportError, SyntaxError) as error:  # of a module that a command imports
        _fail(error)
    except KeyboardInterrupt:  # outside the part of main.main() that handles it
        return _INTERRUPTED


def _load() -> Callable[[Sequence[str] | None], int]:
    """Return main.main().  Raises any exception if files of this package are missing or broken."""
    from . import main as program

    for name, module in list(sys.modules.items()):
        if name.startswith("socketprotector.") and _is_empty(str(module.__file__)):
            raise ImportError(f"{name} is empty")
    return program.main


def _is_empty(file: str) -> bool:
    """Return whether a module's file is empty: after a power cut, a new installation's may be."""
    try:
        return os.stat(file).st_size == 0
    except OSError:  # for example in a zip file
        return False


def _fail(error: BaseException) -> NoReturn:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    why = f"files of SocketProtector are missing or broken ({what}); install it again"
    lack = lack_of_memory(error)
    with suppress(OSError):
        os.write(2, f"socketprotectorctl: {lack or why}\n".encode(errors="replace"))
    os._exit(_NO_MEMORY_STATUS if lack else _BROKEN_STATUS)


if __name__ == "__main__":
    sys.exit(main())
