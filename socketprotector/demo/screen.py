"""The demo's output: permanent lines, and on a terminal a last line that is redrawn.

ASCII only, because the terminal may have any encoding.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..ctl import render


class Screen:
    """Writes to stdout; only whole lines if it is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or render.console()
        self._live: Live | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Allow a redrawn last line until the block ends, which removes it."""
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            try:
                yield
            finally:
                self._live = None

    def say(self, text: str = "", style: str = "", indent: int = 0) -> None:
        """Write a text of one or more lines, wrapped to the width."""
        begin = " " * indent
        lines = [begin + line for line in text.split("\n")]
        if self._console.is_terminal:
            width = self._console.width
            lines = [
                part
                for line in lines
                for part in textwrap.wrap(line, width, subsequent_indent=begin) or [""]
            ]
        for line in lines:
            self._console.print(Text(line, style=style), soft_wrap=True)

    def now(self, text: str) -> None:
        """Redraw the last line; do nothing without a terminal."""
        if self._live is not None:
            shown = Text(f"  {text}", style="dim", no_wrap=True, overflow="ellipsis")
            self._live.update(shown, refresh=True)
