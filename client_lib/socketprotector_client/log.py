"""The library's lines in the program's log, without loading `logging`.

`logging` costs 8 ms of each start and a megabyte of each worker.  A program that has not loaded
`logging` has not configured it.  Warnings and errors then go to stderr, in the format of `logging`.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The levels' numbers in `logging`.
_DEBUG, _WARNING, _ERROR = 10, 30, 40


class Logger:
    """The part of logging.Logger that this library uses."""

    def __init__(self, name: str) -> None:
        """Log as the logger `name` of `logging`."""
        self._name = name

    def debug(self, message: str, *args: object) -> None:
        self._log(_DEBUG, message, args)

    def warning(self, message: str, *args: object) -> None:
        self._log(_WARNING, message, args)

    def error(self, message: str, *args: object) -> None:
        self._log(_ERROR, message, args)

    def exception(self, message: str, *args: object) -> None:
        """Log an error, with the traceback of the exception that is being handled."""
        self._log(_ERROR, message, args, traceback=True)

    def _log(
        self, level: int, message: str, args: tuple[object, ...], *, traceback: bool = False
    ) -> None:
        # Not imported here: the line may report that the process can open no more files.
        logging: Any = sys.modules.get("logging")
        if hasattr(logging, "getLogger"):
            logger = logging.getLogger(self._name)
            logger.log(level, message, *args, exc_info=traceback, stacklevel=3)
        elif level >= _WARNING:
            _print(message % args)
            if traceback:
                sys.__excepthook__(*sys.exc_info())


def _print(line: str) -> None:
    if sys.stderr is not None:
        try:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # closed: a lost line must not end the worker
            pass
