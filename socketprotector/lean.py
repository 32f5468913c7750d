"""Keeps `inspect` out of the resident process: 1 MB that nothing there needs.

`dataclasses` imports it only to make up docstrings for classes that have none; ours have.
What stands in its place loads the real one at the first use, so that nothing can break.
To be imported before everything else; tests hold that it works.
"""

from __future__ import annotations

import sys
from types import ModuleType


class _Later(ModuleType):
    """A module that is loaded when somebody asks for something in it."""

    def __getattr__(self, name: str) -> object:
        # The import machinery itself asks for names like __spec__ and must not load it.
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(__import__(self.__name__), name)


def defer(name: str) -> None:
    """Load a module of the standard library only if somebody uses it."""
    sys.modules.setdefault(name, _Later(name))
