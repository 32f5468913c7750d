"""The library's own lines for the program's log, without loading `logging`.

`logging` takes 8 ms of each start and a megabyte of each worker.  Where the program has not loaded
it, no program has configured it: a warning or an error then goes to stderr, as `logging` writes it.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging


class Logger:
    """The part of logging.Logger that this library uses."""

    def __init__(self, name: str) -> None:
        """name: of the logger in `logging`."""
        self._name = name

    def debug(self, message: str, *args: object) -> None:
        logger = self._logger()
        if logger is not None:
            logger.debug(message, *args, stacklevel=2)

    def warning(self, message: str, *args: object) -> None:
        logger = self._logger()
        if logger is not None:
            logger.warning(message, *args, stacklevel=2)
        else:
            _print(message % args)

    def error(self, message: str, *args: object) -> None:
        logger = self._logger()
        if logger is not None:
            logger.error(message, *args, stacklevel=2)
        else:
            _print(message % args)

    def exception(self, message: str, *args: object) -> None:
        """Add the traceback of the exception that is being handled."""
        logger = self._logger()
        if logger is not None:
            logger.exception(message, *args, stacklevel=2)
        else:
            _print(message % args)
            sys.__excepthook__(*sys.exc_info())

    def _logger(self) -> logging.Logger | None:
        # Never imported here: a line may be about a process that cannot open a file.
        loaded = sys.modules.get("logging")
        return loaded.getLogger(self._name) if hasattr(loaded, "getLogger") else None  # type: ignore[union-attr]


def _print(line: str) -> None:
    if sys.stderr is not None:
        try:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # closed: a worker does not end for a line of its log
            pass
