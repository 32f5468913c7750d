"""Releases: their names, the history of tried releases, and the way back by rollbacks.

Pure.  The history has an entry for each time that a release was tried, the newest last.
The history of reloads: model/history.py.
"""

from __future__ import annotations

import json

from . import json_text
from .lazy_dataclass import as_dict, frozen, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Stands for the release's absolute path in the values of some options.
PLACEHOLDER = "{release}"
#: The variable in which workers and checks find the release's name.
VARIABLE = "SOCKETPROTECTOR_RELEASE"
#: How many entries the history keeps.
ENTRIES = 50
#: The longest file of a history that is read.
MOST_BYTES = 1 << 20
_LONGEST_NAME = 128
_FORMAT = 2
_PUNCTUATION = frozenset("._+~@=:,-")
#: The longest reason that is kept.
_REASON_CHARACTERS = 300
#: The errors that malformed contents raise.  An infinite number raises OverflowError.
_WRONG = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)

#: The outcomes of trying a release.  A failed release was started; a refused one was not.
PROVED, FAILED, REFUSED = _OUTCOMES = ("proved", "failed", "refused")

NAME_IS = "a name of 1 to 128 letters, digits and ._+~@=:,- that begins with a letter or digit"


class HistoryError(Exception):
    """The contents of a file are no history; the message says why."""


@frozen
class Fingerprint:
    """The values that show whether a release was changed after it was proved; zeros: unknown.

    Only the folder itself and the program are compared, because a start changes other files, such
    as __pycache__.
    """

    device: int = 0
    inode: int = 0
    program: str = ""
    program_inode: int = 0
    program_size: int = 0
    program_mtime_ns: int = 0


@frozen
class Entry:
    """One try of a release.  at: seconds since the epoch."""

    release: str
    at: float
    outcome: str = PROVED
    reason: str = ""  # why it was not proved
    was: Fingerprint | None = None  # when it was proved; None: it was not, or unknown


@frozen
class ReleaseHistory:
    """The last entries, and the way back; in both, the newest is last.

    way: the releases to which rollbacks lead, up to the serving release.  It is stored separately,
    because old entries are dropped.
    """

    entries: tuple[Entry, ...] = ()
    way: tuple[str, ...] = ()


def is_name(text: object) -> bool:
    """Return True if a text can be the name of a release."""
    if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_NAME or not text.isascii():
        return False
    return text[0].isalnum() and all(each.isalnum() or each in _PUNCTUATION for each in text)


def fill(text: str, path: str) -> str:
    """Return a value of an option with the release's path in place of `{release}`."""
    return text.replace(PLACEHOLDER, path) if path else text


def added(history: ReleaseHistory, entry: Entry) -> ReleaseHistory:
    """Return the history with a new entry.

    A release that fails repeatedly keeps only one entry, so that it displaces no proved release.
    """
    kept = history.entries
    if entry.outcome != PROVED:
        kept = tuple(e for e in kept if e.outcome == PROVED or e.release != entry.release)
        entry = replace(entry, reason=entry.reason[:_REASON_CHARACTERS])
        return replace(history, entries=(*kept, entry)[-ENTRIES:])
    if kept and kept[-1].outcome == PROVED and kept[-1].release == entry.release:
        # The same release is serving again: keep the time from which it has served.
        entry = replace(entry, at=kept[-1].at)
        kept = kept[:-1]
    return ReleaseHistory((*kept, entry)[-ENTRIES:], _way_to(entry.release, history.way))


def _way_to(name: str, way: tuple[str, ...]) -> tuple[str, ...]:
    """Return the way back from the release that is serving now.

    If the release is already on the way, later releases are cut off.  So each rollback goes further
    back, and never returns to a release that was rolled back.
    """
    if name in way:
        return way[: way.index(name) + 1]
    return (*way, name)[-ENTRIES:]


def previous(history: ReleaseHistory, serving: str, exists: Callable[[str], bool]) -> str:
    """Return the release to roll back to; "" if there is none.

    Releases that are gone, or that failed or were refused when last tried, are skipped.
    """
    for name in reversed(_way_to(serving, history.way)[:-1]):
        if not failed_last(history, name) and exists(name):
            return name
    return ""


def failed_last(history: ReleaseHistory, name: str) -> bool:
    """Return True if a release failed, or was refused, when it was last tried."""
    last = next((each for each in reversed(history.entries) if each.release == name), None)
    return last is not None and last.outcome != PROVED


def latest(history: ReleaseHistory) -> dict[str, tuple[Entry | None, Entry | None]]:
    """Return each release's last proof, and its last failure or refusal.

    The releases are in the order in which they were last tried.
    """
    found: dict[str, tuple[Entry | None, Entry | None]] = {}
    for each in history.entries:
        proved, other = found.pop(each.release, (None, None))
        found[each.release] = (each, other) if each.outcome == PROVED else (proved, each)
    return found


def failed_warning(current: str) -> str:
    """Return the warning for a link `current` that names a failed release."""
    return f"current names {current}, which failed; a restart would start {current}"


def dump(history: ReleaseHistory) -> bytes:
    """Return a history as the contents of its file."""
    lines = ",\n".join(json.dumps(as_dict(each)) for each in history.entries)
    way = json.dumps(history.way)
    return f'{{"format": {_FORMAT}, "way": {way}, "entries": [\n{lines}\n]}}\n'.encode()


def load(data: bytes) -> ReleaseHistory:
    """Return the history that `dump` wrote.  Raises HistoryError.

    An entry with an outcome that only a newer version knows is left out.
    """
    try:
        found = json_text.parse(data)
        if found["format"] != _FORMAT:
            raise HistoryError("another version of SocketProtector has written it")
        known = (each for each in found["entries"] if each["outcome"] in _OUTCOMES)
        way, entries = tuple(found["way"]), tuple(map(_entry, known))
    except _WRONG as error:
        raise HistoryError(f"it is no history of releases ({error})") from error
    if not all(map(is_name, way)):
        raise HistoryError("a release has no name")
    return ReleaseHistory(entries[-ENTRIES:], way[-ENTRIES:])


def _entry(found: dict[str, object]) -> Entry:
    was = found.get("was")
    release, at, outcome, reason = (found[each] for each in ("release", "at", "outcome", "reason"))
    if not is_name(release) or not isinstance(at, int | float):
        raise ValueError("an entry has no name or time")
    if not isinstance(reason, str):
        raise ValueError("an entry has no reason")
    entry = Entry(str(release), at, str(outcome), reason)
    if not isinstance(was, dict):
        return entry
    names = ("device", "inode", "program_inode", "program_size", "program_mtime_ns")
    numbers = {name: int(was[name]) for name in names}
    return replace(entry, was=Fingerprint(program=str(was["program"]), **numbers))
