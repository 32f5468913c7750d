"""A configuration file that is written again between reloads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tests.scenarios.operating import MANY


class File:
    """A configuration file, with a few keys that most tests want."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listens: list[str] = ["127.0.0.1:0"]
        self.command: Iterable[str] = MANY

    def says(self, keys: str = "", tables: str = "") -> File:
        """Put a new file in place of the old one, never half-written."""
        words, listens = json.dumps([*self.command]), json.dumps(self.listens)
        new = self.path.with_suffix(".new")
        new.write_text(f"{keys}\nlisten = {listens}\ncommand = {words}\n{tables}\n")
        new.rename(self.path)
        return self
