"""The page of `socketprotectorctl --help` (at most 40 lines), and the page of `--help-all`."""

from __future__ import annotations

from collections.abc import Iterable

import click

#: Heading of --help-all -> its commands, in the order of the manual page.
GROUPS = {
    "Queries": (
        *("status", "ready", "connections", "history", "releases", "crashes", "diff", "events"),
        "list",
        "top",
    ),
    "Reload, upgrade, stop": (*("reload", "deploy", "promote", "rollback", "upgrade", "stop"),),
    "Workers, clients, log": (
        *("scale", "lame-duck", "hold", "release", "replace", "kill", "log-level", "reopen"),
    ),
    "Shell": ("completion",),
}
#: The commands that --help shows.
COMMON = (
    *("list", "status", "top", "reload", "diff", "history", "crashes", "connections"),
    *("deploy", "promote", "rollback", "scale", "upgrade", "stop"),
)
_PURPOSE = """Inspect and control a running SocketProtector. If several instances run, choose one by
--name, --control or --pid-file, before or after the command."""
_MAIN_STATUSES = """Exit status of reload, upgrade: 0: the new version took over; 3: the new
version failed or was called off (the old version serves, or is stopping)."""
_MORE = """--help-all shows every command and exit status. COMMAND --help shows a command's
options. Each command has --json."""
EXAMPLES = (
    "socketprotectorctl --name web reload --timeout 2m && echo deployed",
    "socketprotectorctl --name web reload --dry-run",
    "socketprotectorctl --name web status --json",
)
#: Exit status -> its meaning, for --help-all.
_ALL_STATUSES = (
    ("0", "done"),
    (
        "1",
        "no protector answers, the connection to the protector was lost and could not be "
        "restored, or the output could not be written",
    ),
    (
        "2",
        "the command line is wrong; deploy, rollback: a condition is not met, and nothing was "
        "tried; releases: the protector has no --releases",
    ),
    (
        "3",
        "reload, deploy, rollback, upgrade: the new version failed or was called off (the "
        "old version serves, or is stopping); diff: a reload would fail; ready: not ready; each "
        "command: files of SocketProtector are missing or broken",
    ),
    (
        "4",
        "not done within --timeout; if the request was already sent, the operation continues, and "
        "may still succeed",
    ),
    (
        "5",
        "deploy, rollback: the requested version is serving, but the link --current or the "
        "history is not on disk yet",
    ),
    ("6", "deploy, rollback: a start, reload, dry run or other deploy is in progress"),
    ("100", "the command was refused for another reason, or this user has no permission"),
    ("130", "interrupted"),
)


class HelpGroup(click.Group):
    """The group of all commands; it formats the pages of --help and --help-all."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the page of --help to the formatter."""
        self.format_usage(ctx, formatter)
        _write_paragraphs(formatter, _PURPOSE)
        self._write_options(ctx, formatter)
        self._write_commands(formatter, "Commands", COMMON)
        with formatter.section("Examples"):
            for line in EXAMPLES:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")
        _write_paragraphs(formatter, _MAIN_STATUSES, _MORE)

    def full_help(self, ctx: click.Context) -> str:
        """Return the page of --help-all."""
        formatter = ctx.make_formatter()
        self.format_usage(ctx, formatter)
        _write_paragraphs(formatter, _PURPOSE, _MORE)
        self._write_options(ctx, formatter)
        for title, names in GROUPS.items():
            self._write_commands(formatter, title, names)
        with formatter.section("Exit status"):
            formatter.write_dl(_ALL_STATUSES)
        return formatter.getvalue().rstrip("\n")

    def _write_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = (each.get_help_record(ctx) for each in self.get_params(ctx))
        with formatter.section("Options"):
            formatter.write_dl([row for row in rows if row is not None])

    def _write_commands(
        self, formatter: click.HelpFormatter, title: str, names: Iterable[str]
    ) -> None:
        with formatter.section(title):
            rows = [(name, self.commands[name].get_short_help_str(60)) for name in names]
            formatter.write_dl(rows)


def print_full_help(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """Print the page of --help-all and exit: the callback of the option --help-all."""
    if value and not ctx.resilient_parsing:
        assert isinstance(ctx.command, HelpGroup)
        click.echo(ctx.command.full_help(ctx))
        ctx.exit()


def _write_paragraphs(formatter: click.HelpFormatter, *texts: str) -> None:
    for each in texts:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(each)
