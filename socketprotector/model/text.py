"""Words for people: how a process ended, how long a time is, and text that is safe to show.

Pure.  Whatever comes from a worker or a client is escaped before it reaches a
terminal or a log, so that it cannot forge a line or drive a terminal.
"""

from __future__ import annotations

#: Ends the first line of a reason that has a worker's last words in the lines after it.
LAST_WORDS = "; its last words:"

#: The units of times, the greatest first, in microseconds.
UNITS_US = {
    "d": 86_400_000_000,
    "h": 3_600_000_000,
    "m": 60_000_000,
    "s": 1_000_000,
    "ms": 1000,
    "us": 1,
}


def escape(text: str) -> str:
    r"""Return text with every control character as \n, \t, \x1b or \u2028."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def output_line(line: str) -> str:
    """Return a line that a program wrote, safe to show: its tabs as blanks, the rest escaped."""
    return escape(line.expandtabs())


def last_line(written: bytes) -> str:
    """Return the last line of what a program has written, safe to show; empty if there is none."""
    lines = written.decode("utf-8", "replace").strip().splitlines()
    return output_line(lines[-1].strip()) if lines else ""


def in_one_line(text: str) -> str:
    """Return a text of several lines, as click says what may be chosen, in one without its stop.

    A value of hundreds of characters is shortened: the reason stands behind it.
    """
    line = " ".join(line.strip() for line in text.splitlines()).rstrip(".")
    return " ".join(shortened(word, 200) for word in line.split(" "))


def shortened(text: str, most: int = 40) -> str:
    """Return a text of at most so many characters whole, and of a longer one the beginning."""
    return text if len(text) <= most else f"{text[:40]}..."


def whole(text: str, most: int) -> int | None:
    """Return the whole number that a text is in ASCII digits; None: no number, or above most."""
    if text.isascii() and text.isdigit() and len(text.lstrip("0")) <= len(str(most)):
        number = int(text.lstrip("0") or "0")
        return number if number <= most else None
    return None


def headline(reason: str) -> str:
    """Return a reason without the last words that follow it."""
    return reason.partition("\n")[0].removesuffix(LAST_WORDS)


def added(reason: str, more: str) -> str:
    """Return a reason with something more in its first line, before last words that follow."""
    if not more:
        return reason
    first, end, words = reason.partition("\n")
    mark = LAST_WORDS if first.endswith(LAST_WORDS) else ""
    return f"{headline(reason)}; {more}{mark}{end}{words}"


def field(value: object) -> str:
    """Return a log field's value: bare where it can be, else quoted."""
    text = str(value)
    if text and text.isprintable() and not any(mark in text for mark in ' "=\\'):
        return text
    return '"' + escape(text.replace("\\", "\\\\")).replace('"', '\\"') + '"'


def in_units(seconds: float) -> str:
    """Return a time as an operator writes it: 30d, 1h30m, 2.5s, 500ms; to the microsecond."""
    left = round(seconds * UNITS_US["s"])
    parts = []
    for unit in ("d", "h", "m"):
        count, left = divmod(left, UNITS_US[unit])
        parts += [f"{count}{unit}"] * bool(count)
    unit = "s"
    if not parts and 0 < left < UNITS_US["s"]:
        unit = "ms" if left >= UNITS_US["ms"] else "us"
    if left or not parts:
        parts.append(f"{left / UNITS_US[unit]:f}".rstrip("0").rstrip(".") + unit)
    return "".join(parts)


def ended(exited: bool, status: int, *, dumped: bool = False) -> str:
    """Say how a process ended: by its exit status or by a signal."""
    if exited:
        return f"exited with status {status}"
    from signal import Signals  # here: the guard, which says no such thing, has no megabyte for it

    try:
        name = Signals(status).name
    except ValueError:
        name = f"signal {status}"
    return f"was killed by {name}" + (" (core dumped)" if dumped else "")


def status_of(wait_status: int) -> tuple[bool, str]:
    """Return (whether it exited with status 0, how it ended) of a status as wait(2) gives it."""
    if wait_status & 0x7F:
        return False, ended(False, wait_status & 0x7F, dumped=bool(wait_status & 0x80))
    return wait_status == 0, ended(True, wait_status >> 8)
