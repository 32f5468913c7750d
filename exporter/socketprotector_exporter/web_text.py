"""The page's texts of events, verdicts and last words.

Workers may write these texts, so they are cut, and control characters are escaped.  The page
inserts them as text, never as HTML.
"""

from __future__ import annotations

from typing import Any

from socketprotector.ctl.api import Status, label, measure, number_in, text, text_in

_LINE_CHARACTERS = 240
#: How many of the last characters of last words are shown; the reason is at the end.
_WORDS_CHARACTERS = 4000
#: The most generations, listeners or waits on the page, because drawing each takes time.
_MEMBERS = 64
_NOT_FIELDS = ("v", "event", "at", "level", "last_words")


def shortened(status: Status) -> Status:
    """Return a status with the last _MEMBERS members of each list."""
    return {
        name: value[-_MEMBERS:] if isinstance(value, list) else value
        for name, value in status.items()
    }


def event_line(message: Status, generation: int = 0) -> dict[str, Any]:
    """Return the shown fields of an event.  generation: the event's generation; 0: none."""
    fields = [
        f"{line(name)}={text.field(_begun(value) if isinstance(value, str) else value)}"
        for name, value in message.items()
        if name not in _NOT_FIELDS
        and isinstance(value, str | int | float)
        and not (generation and name == "generation")  # shown beside the event's name
    ]
    return {
        "at": measure(message, "at"),
        "level": label(message, "level") or "info",
        "event": line(label(message, "event") or ""),
        "generation": generation,
        "text": cut(" ".join(fields)),
        "last": last_line(words_of(text_in(message, "last_words"))),
    }


def verdict_of(reload: Status) -> dict[str, Any]:
    """Return the shown result of a reload or a dry run."""
    reason = text_in(reload, "reason")
    words = words_of(reason.partition("\n")[2])
    return {
        "generation": number_in(reload, "generation"),
        "at": measure(reload, "ended_at"),
        "reason": line(text.headline(reason)),
        "words": words,
        "last_line": last_line(words),
    }


def words_of(last_words: str) -> str:
    """Return the end of last words, in lines without control characters."""
    words = last_words.rstrip("\n")[-_WORDS_CHARACTERS:].lstrip("\n")
    return "\n".join(map(text.escape, words.replace("\t", "    ").split("\n")))


def last_line(words: str) -> str:
    """Return the last line of last words that is not blank."""
    return cut(next((said for each in reversed(words.split("\n")) if (said := each.strip())), ""))


def line(value: str) -> str:
    """Return a text in one line that is not too long."""
    return cut(text.escape(_begun(value)))


def _begun(value: str) -> str:
    """Return the beginning of a text, because escaping 256 KB would take long."""
    return value[: _LINE_CHARACTERS + 1]


def cut(value: str, characters: int = _LINE_CHARACTERS) -> str:
    """Return a text, or its beginning if it is longer than that."""
    return value if len(value) <= characters else value[: characters - 1] + "…"
