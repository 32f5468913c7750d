#!/usr/bin/env python3
"""Write the generated tables of the documents: options, events, metrics, ...

tools/reference.py            (writes the text between the marks in PAGES; `make docs`)
tools/reference.py --check    (writes nothing; status 1 if a page differs; `make lint`)

In some tables people write the last column, the meaning of a row.  The first column must have
exactly the names in the code; the columns between are generated.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import click
import code_facts

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "exporter")]

from socketprotector_exporter.metrics import MetricSet  # noqa: E402

from socketprotector.launch.option_values import FLAG, SURGE, TEXT, TIME  # noqa: E402
from socketprotector.launch.options import CHANGES, GROUPS, STAYS, Option  # noqa: E402
from socketprotector.model import control_requests  # noqa: E402
from socketprotector.model.duration import Value  # noqa: E402
from socketprotector.model.handoff_modes import MODES  # noqa: E402
from socketprotector.system import signals  # noqa: E402

#: Option -> the modes that refuse it.
REFUSING = {
    option: [mode for mode, each in MODES.items() if option in each.refuses]
    for option in {option for each in MODES.values() for option in each.refuses}
}
#: The names of pages and of options in a text.
PAGE = re.compile(r"\bdocs/([\w-]+\.md)")
LONG = re.compile(
    r"(?<![\w`-])--[a-z][a-z-]*(?: (?:connection|listener|stdio|legacy|debug))?(?![\w-])"
)


def meaning(option: Option) -> str:
    text = " ".join(option.text.split("\n"))
    refusing = REFUSING.get(option.key, [])
    if refusing and len(refusing) == len(MODES) - 1:
        (mode,) = set(MODES) - set(refusing)
        with_mode = f"With --handoff {mode}"
        text += "" if text.startswith(with_mode) else f" Only with --handoff {mode}."
    elif refusing:
        text += f" Not with --handoff {' or --handoff '.join(refusing)}."
    return text


def default(option: Option) -> str:
    given = isinstance(option.default, str) or type(option.default) is int
    return option.unset or (f"`{option.default}`" if given else "")


def key(option: Option) -> str:
    """Return the type of an option's value in a configuration file."""
    if option.no_key:
        return "no key" if option.no_key.startswith("for") else f"no key; {option.no_key}"
    if option.multiple:
        return "table"
    if option.kind is FLAG:
        return "true or false"
    if isinstance(option.kind, type(TIME)):
        return "TIME"
    if isinstance(option.kind, click.types.IntParamType):
        return "whole number"
    if option.kind is SURGE:
        return "whole number or string"
    if option.kind is TEXT or isinstance(option.kind, (Value, click.Choice)):
        return "string"
    raise AssertionError(option.key)


def names(option: Option) -> list[str]:
    return sorted(option.opts, key=len)


def options(text: str) -> str:
    """Return the tables of options in the reference."""
    found = []
    for title, group in GROUPS.items():
        found.append(f"### {title}\n")
        found.append("| option | meaning | default | in a file | at a reload |")
        found.append("|---|---|---|---|---|")
        for option in group:
            called = ", ".join(f"`{name}`" for name in names(option)[:-1])
            last = f"`{f'{names(option)[-1]} {option.values}'.rstrip()}`"
            reload = "" if option.no_key else option.at_reload
            cells = [
                ", ".join(filter(None, (called, last))),
                LONG.sub(lambda each: f"`{each[0]}`", meaning(option)),
                LONG.sub(lambda each: f"`{each[0]}`", default(option)),
                key(option),
                {STAYS: "restart", CHANGES: ""}.get(reload, reload),
            ]
            row = " | ".join(each.replace("|", "\\|") for each in cells)
            found.append("| " + PAGE.sub(r"[docs/\1](\1)", row) + " |")
        found.append("")
    return "\n".join(found)


def roff(text: str) -> str:
    """Return a text for a manual page: the dashes of options are no hyphens."""
    return re.sub(r"(?<!\w)-", r"\\-", text.replace("\\", r"\e").replace("`", ""))


def manual_options(text: str) -> str:
    """Return the options for the manual page."""
    found = []
    for title, group in GROUPS.items():
        found.append(f".SS {title}")
        for option in group:
            called = ", ".join(rf"\fB{roff(name)}\fR" for name in names(option))
            found += [
                ".TP",
                f"{called} \\fI{roff(option.values)}\\fR" if option.values else called,
            ]
            unset = f" Default: {default(option)}." if default(option) else ""
            found.append(roff(meaning(option) + unset))
    return "\n".join(found) + "\n"


class Wrong(Exception):
    """A mistake in a page that people must fix."""


def cells(row: str) -> list[str]:
    return [each.strip() for each in re.split(r"(?<!\\)\|", row)[1:-1]]


def filled(text: str, facts: Mapping[str, tuple[str, ...]]) -> str:
    """Return tables with newly generated columns between the first and the last.

    Raises Wrong if their names differ from those of the facts.
    """
    lines, named, is_body = [], [], False
    for line in text.splitlines():
        is_body = line.startswith("|") and (is_body or line.startswith("|---"))
        if is_body and not line.startswith("|---"):
            first, *_, meaning = cells(line)
            names = re.findall(r"[\w-]+", first.partition("(")[0])
            if unknown := [each for each in names if each not in facts]:
                raise Wrong(f"the code has no {', '.join(unknown)}")
            columns = zip(*(facts[each] for each in names), strict=True)
            made = [", ".join(unique(each.split(", ") for each in column)) for column in columns]
            line = f"| {' | '.join([first, *made, meaning])} |".replace("|  |", "| |")
            named += names
        lines.append(line + "\n")
    if missing := sorted(facts.keys() - set(named)):
        raise Wrong(f"no row for {', '.join(missing)}: add it, with its meaning")
    return "".join(lines)


def unique(lists: Iterable[list[str]]) -> list[str]:
    """Return the items of all lists in order, without duplicates and empty ones."""
    return [*dict.fromkeys(each for found in lists for each in found if each)]


def events(text: str) -> str:
    return filled(
        text,
        {
            event: (", ".join(levels), ", ".join(f"`{each}`" for each in fields))
            for event, (levels, fields) in code_facts.log_events().items()
        },
    )


def metrics(text: str) -> str:
    found = ["| metric, with its other labels | type | |", "|---|---|---|"]
    for family in MetricSet().families():
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        if labels := ", ".join(family._labelnames[1:]):  # type: ignore[attr-defined]
            name += f"{{{labels}}}"
        meaning = LONG.sub(lambda each: f"`{each[0]}`", family.documentation.removesuffix("."))
        found.append(f"| `{name}` | {family.type} | {meaning} |")
    return "\n".join(found) + "\n"


def commands(text: str) -> str:
    def arguments(command: control_requests.Command) -> str:
        taken = {name: f"`{name}` ({kind})" for name, (kind, _) in command.arguments.items()}
        if not (taken and command.optional):
            return " or ".join(taken.values())
        required = taken.pop(command.required, "")
        return f"{required and f'{required}; '}optional: {', '.join(taken.values())}"

    return filled(
        text, {name: (arguments(each),) for name, each in control_requests.COMMANDS.items()}
    )


def signal_names(text: str) -> str:
    names = [signal.Signals(each).name.removeprefix("SIG") for each in signals.TO_THE_PROTECTOR]
    return filled(text, dict.fromkeys(names, ()))


def statuses(text: str) -> str:
    return filled(text, dict.fromkeys(map(str, code_facts.exit_statuses()), ()))


def environment(text: str) -> str:
    return filled(text, dict.fromkeys(code_facts.environment(), ()))


def manual_table(mark: str) -> Callable[[str], str]:
    """Return a function that makes a table of the reference a list of the manual page."""

    def made(text: str) -> str:
        table = between(REFERENCE.read_text(encoding="utf-8"), f"<!-- {mark} -->\n")
        found = []
        for row in table.splitlines()[2:]:
            first, meaning = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", each) for each in cells(row))
            found += [".TP", f".B {roff(first)}", roff(meaning[0].upper() + meaning[1:]) + "."]
        return "\n".join(found) + "\n"

    return made


REFERENCE = ROOT / "docs" / "reference.md"
MANUAL = ROOT / "docs" / "man" / "SocketProtector.8"
#: Page, mark, and the function that makes the text between the marks `NAME` and `/NAME` from the
#: present text.  The manual page is last, because it repeats the reference.
PAGES: tuple[tuple[Path, str, Callable[[str], str]], ...] = (
    (REFERENCE, "options", options),
    (REFERENCE, "signals", signal_names),
    (REFERENCE, "statuses", statuses),
    (REFERENCE, "environment", environment),
    (ROOT / "docs" / "log.md", "events", events),
    (ROOT / "docs" / "metrics.md", "metrics", metrics),
    (ROOT / "docs" / "control.md", "commands", commands),
    (MANUAL, "options", manual_options),
    (MANUAL, "signals", manual_table("signals")),
    (MANUAL, "statuses", manual_table("statuses")),
    (MANUAL, "environment", manual_table("environment")),
)


def marks(path: Path, mark: str) -> tuple[str, str]:
    if path == MANUAL:
        return f'.\\" {mark}\n', f'.\\" /{mark}\n'
    return f"<!-- {mark} -->\n", f"<!-- /{mark} -->\n"


def between(text: str, begin: str) -> str:
    return text.partition(begin)[2].partition(begin.replace("<!-- ", "<!-- /"))[0]


def main(words: list[str]) -> int:
    """Write the pages, or with --check report the differing ones."""
    status = 0
    for path, mark, make in PAGES:
        name = path.relative_to(ROOT)
        text = path.read_text(encoding="utf-8")
        begin, end = marks(path, mark)
        before, _, rest = text.partition(begin)
        now, _, after = rest.partition(end)
        assert after, f"{name}: no marks for {mark}"
        try:
            made = make(now)
        except Wrong as wrong:
            print(f"{name}, table of {mark}: {wrong}", file=sys.stderr)
            status = 1
            continue
        if made == now:
            continue
        if words == ["--check"]:
            print(f"{name}: the table of {mark} differs from the code: make docs", file=sys.stderr)
            status = 1
        else:
            path.write_text(f"{before}{begin}{made}{end}{after}", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
