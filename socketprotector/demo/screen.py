"""What the demo says: lines that stay, and on a terminal below them one that is drawn anew.

ASCII only: the terminal's encoding may be any.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Screen:
    """Writes to stdout; whole lines where that is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, markup=False, emoji=False)
        self._live: Live | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """While this lasts there may be a line for what happens now; it goes at the end."""
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            try:
                yield
            finally:
                self._live = None

    def say(self, text: str = "", style: str = "", indent: int = 0) -> None:
        """Write a text of one line or more; what does not fit goes on below it."""
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
        """Write what happens now over what was written so before; without a terminal: nothing."""
        if self._live is not None:
            shown = Text(f"  {text}", style="dim", no_wrap=True, overflow="ellipsis")
            self._live.update(shown, refresh=True)
