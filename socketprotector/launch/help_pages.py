"""The texts of `SocketProtector --help`, which fits one screen, and of `--help-all`."""

from __future__ import annotations

from collections.abc import Iterable

import click

from ..model import known_servers
from ..system.answer import Answering
from . import options

_PURPOSE = """Open the sockets of a daemon, and start it behind them. A reload starts the new
version beside the old one, and switches when the new one is ready."""
_LISTEN = "LISTEN is 8000, 127.0.0.1:8000, [::1]:8000 or unix:PATH."
_ALL_LISTEN = """LISTEN is PORT, HOST:PORT, [HOST6]:PORT, unix:PATH, unix:@NAME or fd:NAME, with
options as in 4321?backlog=100&defer_accept=5 or unix:/run/x.sock?mode=0660&user=www&group=www."""
#: A test runs each example.
EXAMPLES = (
    r"""SocketProtector -f --handoff listener --ready notify 8000 \
    -- gunicorn --preload app:app""",
    r"""SocketProtector --name web --guard --log-file web.log --handoff listener \
    'unix:/run/web.sock?mode=0666' -- ./web    # accepts on descriptor 3""",
    r"""SocketProtector --name echo --log-file echo.log --workers 4 4321 \
    -- python echo.py                          # has the client library""",
)
_SIGNALS = "Signals: HUP reload; TERM stop; INT stop at once; USR1 reopen the log."
_ALL_SIGNALS = """Signals: HUP reload; TERM, QUIT stop; INT stop at once; USR1 reopen the log file;
USR2 upgrade the protector itself; TTIN add a worker; TTOU end one."""
_MORE = "--help-all: every option. socketprotectorctl --help: reload, status, crashes."
_TIME = "TIME is 500ms, 10s, 1h30m, 1d or plain seconds."
_DEMO = "SocketProtector demo shows a reload and crashes under load, in 20 seconds."


class HelpCommand(Answering, click.Command):
    """A command with --help and --help-all.  Their texts are constants: -OO drops docstrings."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write --help."""
        self.format_usage(ctx, formatter)
        _write_paragraphs(formatter, _PURPOSE, _LISTEN)
        with formatter.section("Options"):
            formatter.write_dl([each.help_row() for each in options.OPTIONS if each.common])
        with formatter.section("Examples"):
            _write_lines(formatter, EXAMPLES)
        _write_paragraphs(formatter, _SIGNALS, _MORE)

    def full_help(self, ctx: click.Context) -> str:
        """Return --help-all."""
        formatter = ctx.make_formatter()
        self.format_usage(ctx, formatter)
        _write_paragraphs(formatter, _PURPOSE, _ALL_LISTEN, _ALL_SIGNALS, _TIME, _DEMO)
        for title, group in options.GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([each.help_row() for each in group])
        with formatter.section("Servers that otherwise bind their own port, for example"):
            _write_lines(formatter, map(known_servers.line, known_servers.KNOWN))
        return formatter.getvalue().rstrip("\n")


def _write_paragraphs(formatter: click.HelpFormatter, *texts: str) -> None:
    for each in texts:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(each)


def _write_lines(formatter: click.HelpFormatter, texts: Iterable[str]) -> None:
    """Write texts without wrapping them, so that they can be copied."""
    for line in (line for each in texts for line in each.splitlines()):
        formatter.write(f"{'':{formatter.current_indent}}{line}\n")
