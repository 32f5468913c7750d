"""`socketprotectorctl` and `python -m socketprotector.ctl`.

If memory is short, or if files of this package are missing or broken, the import of ctl/main.py
fails.  So the import is inside main(), which reports the failure in one line.
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
except Exception:  # broken, too

    def lack_of_memory(error: MemoryError | ImportError) -> str:
        """Stand in for the function of model/errors.py."""
        return "out of memory" if isinstance(error, MemoryError) else ""


_NO_MEMORY_STATUS = 1  # equals cli.OutputFailed.status; without memory, main() cannot import cli
_BROKEN_STATUS = 3  # equals errors.NewVersionFailed.status, for `upgrade --check`
_INTERRUPTED = 130  # equals main.INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.  arguments: if None, sys.argv[1:]."""
    try:
        return _load()(arguments)
    except (MemoryError, ImportError) as error:  # for example under `ulimit -v`
        lack = lack_of_memory(error)
        if not lack:
            raise
        _fail(lack, _NO_MEMORY_STATUS)
    except KeyboardInterrupt:  # outside the part of main.main() that handles it
        return _INTERRUPTED


def _load() -> Callable[[Sequence[str] | None], int]:
    """Return main.main().  If files of this package are missing or broken, exit."""
    try:
        from . import main as program

        for name, module in list(sys.modules.items()):
            if name.startswith("socketprotector.") and _is_empty(str(module.__file__)):
                raise ImportError(f"{name} is empty")
        return program.main
    except (Exception, SystemExit) as error:
        if isinstance(error, MemoryError | ImportError) and lack_of_memory(error):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        why = f"files of SocketProtector are missing or broken ({what}); install it again"
        _fail(why, _BROKEN_STATUS)


def _is_empty(file: str) -> bool:
    """Return whether a module's file is empty: after a power cut, a new installation's may be."""
    try:
        return os.stat(file).st_size == 0
    except OSError:  # for example in a zip file
        return False


def _fail(why: str, status: int) -> NoReturn:
    with suppress(OSError):
        os.write(2, f"socketprotectorctl: {why}\n".encode(errors="replace"))
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
