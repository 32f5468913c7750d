#!/usr/bin/env python3
"""Write the tables of options into docs/reference.md and the manual page, from launch/options.py.

tools/reference.py            (what stands between their `options` marks; `make docs`)
tools/reference.py --check    (write nothing; status 1 where a page says something else)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from socketprotector.launch.option_values import FLAG, TEXT, TIME  # noqa: E402
from socketprotector.launch.options import GROUPS, STAYS, Option  # noqa: E402
from socketprotector.model.duration import Value  # noqa: E402
from socketprotector.model.handoff_modes import MODES  # noqa: E402

#: Which modes refuse an option, by its name.
REFUSING = {
    option: [mode for mode, each in MODES.items() if option in each.refuses]
    for option in {option for each in MODES.values() for option in each.refuses}
}
#: docs/...: as they are named in a text; options likewise.
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
    if option.former:
        text += f" Before: --{option.former}, which works until 1.0."
    return text


def default(option: Option) -> str:
    given = isinstance(option.default, str) or type(option.default) is int
    return option.unset or (f"`{option.default}`" if given else "")


def key(option: Option) -> str:
    """What its value is in a file."""
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
    if option.kind is TEXT or isinstance(option.kind, (Value, click.Choice)):
        return "string"
    raise AssertionError(option.key)


def names(option: Option) -> list[str]:
    return sorted(option.opts, key=len)


def written(option: Option) -> str:
    if isinstance(option.kind, click.Choice):
        return "|".join(map(str, option.kind.choices))
    return "" if option.kind is FLAG else str(option.metavar)


def markdown() -> str:
    """The tables of the reference."""
    found = []
    for title, group in GROUPS.items():
        found.append(f"### {title}\n")
        found.append("| option | meaning | default | in a file | at a reload |")
        found.append("|---|---|---|---|---|")
        for option in group:
            called = ", ".join(f"`{name}`" for name in names(option)[:-1])
            last = f"`{' '.join(filter(None, (names(option)[-1], written(option))))}`"
            reload = "" if option.no_key else option.at_reload
            cells = [
                ", ".join(filter(None, (called, last))),
                LONG.sub(lambda each: f"`{each[0]}`", meaning(option)),
                LONG.sub(lambda each: f"`{each[0]}`", default(option)),
                key(option),
                "needs a restart" if reload == STAYS else reload,
            ]
            row = " | ".join(each.replace("|", "\\|") for each in cells)
            found.append("| " + PAGE.sub(r"[docs/\1](\1)", row) + " |")
        found.append("")
    return "\n".join(found)


def roff(text: str) -> str:
    """A text as a manual page has it: dashes of options are no hyphens."""
    return re.sub(r"(?<!\w)-", r"\\-", text.replace("\\", r"\e").replace("`", ""))


def manual() -> str:
    """The sections of the manual page."""
    found = []
    for title, group in GROUPS.items():
        found.append(f".SS {title}")
        for option in group:
            called = ", ".join(rf"\fB{roff(name)}\fR" for name in names(option))
            found += [
                ".TP",
                f"{called} \\fI{roff(written(option))}\\fR" if written(option) else called,
            ]
            unset = f" Default: {default(option)}." if default(option) else ""
            found.append(roff(meaning(option) + unset))
    return "\n".join(found) + "\n"


#: What stands in a page, and between which marks.
PAGES = {
    ROOT / "docs" / "reference.md": (markdown, "<!-- options -->\n", "<!-- /options -->\n"),
    ROOT / "docs" / "man" / "SocketProtector.8": (manual, '.\\" options\n', '.\\" /options\n'),
}


def main(words: list[str]) -> int:
    """Write the pages, or say which are to be written."""
    status = 0
    for path, (make, begin, end) in PAGES.items():
        text = path.read_text(encoding="utf-8")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        assert after, f"{path}: no marks"
        made = f"{before}{begin}{make()}{end}{after}"
        if words == ["--check"] and made != text:
            print(f"{path.relative_to(ROOT)} differs from launch/options.py: make docs")
            status = 1
        elif made != text:
            path.write_text(made, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
