"""Modules of the standard library that an idle protector imports and does not use.

A stand-in takes the place of each, and loads it at the first use.  `re`, with what it imports, is
0.4 MB: json and some modules of ours name patterns when they are imported, and match none of them
until a command, a listener or a file has something to match.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Modules that the standard library imports, and that the resident process never uses: dataclasses
#: has `inspect` (1 MB) to look at classes and `copy` (170 KB, with weakref) for asdict();
#: socket has `selectors` (70 KB) for sendfile().
UNUSED = ("inspect", "copy", "selectors")


class _Later(ModuleType):
    """A module that is loaded when somebody asks for something in it."""

    def __getattr__(self, name: str) -> Any:
        # The import machinery itself asks for names like __spec__ and must not load it.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_loaded(self), name)


class _LaterRe(_Later):
    """The module `re`: a pattern can be named before it is loaded."""

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
            # `re` itself keeps what was compiled.
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
        sys.modules.setdefault(name, stand_in)  # out of descriptors or memory: the next use tries
        raise
