"""Stand-ins for modules of the standard library that an idle protector imports and does not use.

A stand-in loads its module at the first use.  `re` costs 0.4 MB with its own imports.  json and
some of our modules define patterns at import, but use them only later, for a command, a listener or
a file.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Modules that the standard library imports, and that an idle protector never uses.  dataclasses
#: imports `inspect` (1 MB) to examine classes and `copy` (170 KB, with weakref) for asdict();
#: socket imports `selectors` (70 KB) for sendfile() and `array` (100 KB) for send_fds().  Where
#: workers accept, `array` is loaded at the start (daemon/delivery/choice.py).
UNUSED = ("array", "inspect", "copy", "selectors")


class _Later(ModuleType):
    """A stand-in for a module, which loads it when a name in it is looked up."""

    def __getattr__(self, name: str) -> Any:
        # The import machinery looks up names like __spec__, which must not load the module.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_loaded(self), name)


class _LaterRe(_Later):
    """A stand-in for `re`: defining a pattern does not load the module."""

    IGNORECASE, MULTILINE, DOTALL, VERBOSE = 2, 8, 16, 64  # as in _sre

    def compile(self, pattern: str, flags: int = 0) -> _LaterPattern:
        return _LaterPattern(self, pattern, flags)


class _LaterPattern:
    """A regular expression that is compiled when one of its methods is called."""

    def __init__(self, module: ModuleType, *given: Any) -> None:
        self._module, self._given = module, given

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def method(*given: Any) -> Any:
            # `re` itself caches compiled patterns.
            return getattr(_loaded(self._module).compile(*self._given), name)(*given)

        return method


def defer(name: str) -> None:
    """Load a module of the standard library only when code uses it."""
    made = _LaterRe(name) if name == "re" else _Later(name)
    sys.modules.setdefault(name, made)


def _loaded(stand_in: ModuleType) -> Any:
    name = stand_in.__name__
    if sys.modules.get(name) is stand_in:
        del sys.modules[name]
    try:
        return __import__(name)
    except BaseException:
        sys.modules.setdefault(name, stand_in)  # out of descriptors or memory: try again later
        raise
