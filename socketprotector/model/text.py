"""Text for people: durations, reasons, and text that is safe to show.

Pure.  Text from a worker or a client is escaped before it reaches a terminal or a log.  So such
text cannot forge a line or control the terminal.
"""

from __future__ import annotations

#: This ends the first line of a reason if a worker's last words follow in the next lines.
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
    """Return a line of a program's output, safe to show: tabs as blanks, the rest escaped."""
    return escape(line.expandtabs())


def last_line(written: bytes) -> str:
    """Return the last line of a program's output, safe to show; empty without output."""
    lines = written.decode("utf-8", "replace").strip().splitlines()
    return output_line(lines[-1].strip()) if lines else ""


def in_one_line(text: str) -> str:
    """Return a text, such as an error of click, as one line without a full stop.

    Words of more than 200 characters are shortened, so that the reason after them stays visible.
    """
    line = " ".join(line.strip() for line in text.splitlines()).rstrip(".")
    return " ".join(shortened(word, 200) for word in line.split(" "))


def shortened(text: str, most: int = 40) -> str:
    """Return a text; only its beginning if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[:40]}..."


def whole(text: str, most: int) -> int | None:
    """Return the number in a text of ASCII digits; None if it is no number or exceeds `most`."""
    if text.isascii() and text.isdigit() and len(text.lstrip("0")) <= len(str(most)):
        number = int(text.lstrip("0") or "0")
        return number if number <= most else None
    return None


def headline(reason: str) -> str:
    """Return the first line of a reason, without last words."""
    return reason.partition("\n")[0].removesuffix(LAST_WORDS)


def added(reason: str, more: str) -> str:
    """Return a reason with `more` at the end of its first line, before any last words."""
    if not more:
        return reason
    first, end, words = reason.partition("\n")
    before = LAST_WORDS if first.endswith(LAST_WORDS) else ""
    noted = "; ".join(filter(None, (headline(reason), more)))
    return f"{noted}{before}{end}{words}"


def field(value: object) -> str:
    """Return a log field's value, quoted if it needs quotes."""
    text = str(value)
    if text and text.isprintable() and not any(each in text for each in ' "=\\'):
        return text
    return '"' + escape(text.replace("\\", "\\\\")).replace('"', '\\"') + '"'


def in_units(seconds: float) -> str:
    """Return a duration as an operator writes it: 30d, 1h30m, 2.5s, 500ms; to the microsecond."""
    rest_us = round(seconds * UNITS_US["s"])
    parts = []
    for unit in ("d", "h", "m"):
        count, rest_us = divmod(rest_us, UNITS_US[unit])
        parts += [f"{count}{unit}"] * bool(count)
    unit = "s"
    if not parts and 0 < rest_us < UNITS_US["s"]:
        unit = "ms" if rest_us >= UNITS_US["ms"] else "us"
    if rest_us or not parts:
        parts.append(f"{rest_us / UNITS_US[unit]:f}".rstrip("0").rstrip(".") + unit)
    return "".join(parts)
