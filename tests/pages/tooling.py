"""The tools of the documents, as modules."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from tests.running import ROOT


def tool(name: str) -> ModuleType:
    """Return a module of tools/."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "tools"))
