"""What a run of tests says at its end, so that it fits on a screen.

Which tests failed and why, one reason each; how many were skipped, by what they need; then
pytest's own last line.  The logs of failed tests go to a file with --logs-in FILE; without it they
come before, as pytest shows them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from _pytest.terminal import TerminalReporter

#: So many reasons are shown: two lines each, and the rest of the summary, are a screen.
NAMED = 15
#: How long a reason may be.
REASON_CHARS = 150
#: The reason of every skip begins with it; the need follows, then maybe a colon and a detail.
NEEDS = "needs "
_FAILED = (("failed", "FAILED"), ("error", "ERROR"))


def add_option(parser: pytest.Parser) -> None:
    """Add --logs-in."""
    parser.addoption("--logs-in", metavar="FILE", help="write the logs of failed tests to FILE")


def write(reporter: TerminalReporter) -> None:
    """Write the summary, and the logs to their file."""
    file = reporter.config.option.logs_in
    reports = [(word, report) for kind, word in _FAILED for report in reporter.stats.get(kind, [])]
    if file:
        Path(file).unlink(missing_ok=True)
    if reports:
        where = f": the logs are in {file}" if file else ""
        reporter.write_sep("=", f"{len(reports)} failed{where}", red=True)
        for line in failed_lines(reports):
            reporter.write_line(line)
        if file:
            _write_logs(Path(file), reports)
    lines = skipped_lines(reporter.stats.get("skipped", []))
    if lines:
        reporter.write_sep("=", "not checked here")
        for line in lines:
            reporter.write_line(line)


def failed_lines(reports: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """Name each failed test and its reason; of many that fail for one reason the first."""
    by_reason: dict[str, list[str]] = {}
    for word, report in reports:
        by_reason.setdefault(reason_of(report), []).append(f"{word} {report.nodeid}")
    for reason, names in [*by_reason.items()][:NAMED]:
        shown = names if len(reports) <= NAMED else names[:1]
        yield from shown
        more = len(names) - len(shown)
        yield f"    {reason}{f'  (and {more} more with this reason)' if more else ''}"
    left = [*by_reason.values()][NAMED:]
    if left:
        yield f"and {sum(map(len, left))} more"


def reason_of(report: Any) -> str:
    """Return the reason of a failure in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if crash is None:  # of a file that cannot be collected: the error is at the end
        lines.reverse()
    line = lines[0] if lines else "no reason"
    return line if len(line) <= REASON_CHARS else f"{line[: REASON_CHARS - 3]}..."


def skipped_lines(reports: Sequence[Any]) -> list[str]:
    """Count the tests that were skipped, by what they need."""
    count: Counter[str] = Counter()
    for report in reports:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        text = text.removeprefix("Skipped: ")
        count[text.partition(":")[0] if text.startswith(NEEDS) else text] += 1
    lines = []
    for text, number in count.most_common():
        noun, verb = ("test", "needs") if number == 1 else ("tests", "need")
        what = re.sub(f"^{NEEDS}", f"{verb} ", text)
        lines.append(f"NOT CHECKED: {number} {noun} {what}")
    return lines


def _write_logs(file: Path, reports: Sequence[tuple[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", errors="replace") as out:
        for word, report in reports:
            print(f"{'=' * 30} {word} {report.nodeid} ({report.when})", file=out)
            print(report.longreprtext, file=out)
            for title, text in report.sections:
                print(f"----- {title} -----\n{text}", file=out)
