"""All checks, in the order in which they run."""

from __future__ import annotations

from . import checks, installed
from .promises import CHECKS, PACKAGED

__all__ = ["CHECKS", "PACKAGED", "checks", "installed"]
