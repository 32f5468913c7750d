"""What outlives the program: values in a memfd, written whole or not at all.

The memfd holds two slots.  A slot begins with a whole value; what has changed in it since then
follows, one record a change, because to write all of a thousand workers for each of them would
take the time of a million.  Once the changes are longer than the value, a whole one goes to the
other slot.  Each record has a checksum, so whoever dies in the middle of one leaves what was
before it.

Values are told by name (class and field), so that a newer program reads what an older one
wrote: fields it does not find take their defaults.  The other way round is refused in words.
"""

from __future__ import annotations

import binascii
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import MappingProxyType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Grows when an older program could not make sense of what is written: 2 has changes.
FORMAT = 2

#: magic, format, sequence, length, checksum of all before and of the payload; a change has the
#: sequence of the whole value that it follows.
_HEADER = struct.Struct("<4sIQQ")
_CHECKSUM = struct.Struct("<I")
_RECORD_BYTES = _HEADER.size + _CHECKSUM.size  # without the payload
_WHOLE, _CHANGE = b"SPst", b"SPch"
#: The file is sparse: a slot takes the memory of what was written to it.
_SLOT_BYTES = 64 * 1024 * 1024
#: As long may the changes be, also where the value is shorter.
_CHANGES_BYTES = 16 * 1024


def _float(value: float) -> str:
    return float.__repr__(value) if math.isfinite(value) else json.dumps(value)


#: What json.dumps() would say, without its preparations.
_PLAIN: Mapping[type, Callable[[Any], str]] = {
    str: json.encoder.encode_basestring_ascii,
    int: int.__repr__,
    float: _float,
    bool: lambda value: "true" if value else "false",
    type(None): lambda _: "null",
}


class StateError(Exception):
    """The state cannot be used; the message says why."""


class Codec:
    """Turns values of known classes into JSON and back."""

    def __init__(
        self, classes: Iterable[type], formerly: Mapping[str, type] = MappingProxyType({})
    ) -> None:
        """classes: the frozen dataclasses and enums that may occur, each of another name.

        formerly: those of them that had another name, by that: it is read, never written.
        """
        self._classes = {each.__name__: each for each in classes}
        self._fields: dict[type, tuple[str, ...]] = {
            each: tuple(field.name for field in fields(each))
            for each in self._classes.values()
            if is_dataclass(each)
        }
        self._read = {**formerly, **self._classes}

    def encode(self, value: object) -> bytes:
        """Return a value of these classes, tuples, frozensets and plain JSON as bytes.

        Raises TypeError for anything else.
        """
        return self._text(value).encode()

    def changes(self, old: object, new: object) -> bytes:
        """Return what makes the one value the other, for decode(); empty if nothing does.

        Parts that are the same objects cost next to nothing.
        """
        found: list[str] = []
        self._compare("", old, new, found)
        return f"[{','.join(found)}]".encode() if found else b""

    def decode(self, data: bytes, changes: Iterable[bytes] = ()) -> Any:
        """Return the value that was encoded, with all changes.  Raises StateError for none."""
        try:
            tree = {"f": {"": json.loads(data)}}
            for each in changes:
                for change in json.loads(each):
                    _apply(tree, change)
            return self._in(tree["f"][""])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state cannot be read: {error!r}") from error

    def _compare(self, path: str, old: object, new: object, found: list[str]) -> None:
        """Note each difference: a path with a value, with a slice or with what a set lost and got.

        path: the names and places that lead there, each after a comma.
        """
        if old is new:
            return
        if type(old) is type(new):
            names = self._fields.get(type(new))
            if names is not None:
                for name in names:
                    self._compare(f'{path},"{name}"', getattr(old, name), getattr(new, name), found)
                return
            if isinstance(old, tuple) and isinstance(new, tuple):
                self._compare_tuples(path, old, new, found)
                return
            if old == new:
                return
            if isinstance(old, frozenset) and isinstance(new, frozenset):
                less, more = self._text(tuple(old - new)), self._text(tuple(new - old))
                found.append(f'{{"p":[""{path}],"less":{less},"more":{more}}}')
                return
        found.append(f'{{"p":[""{path}],"v":{self._text(new)}}}')

    def _compare_tuples(
        self, path: str, old: tuple[object, ...], new: tuple[object, ...], found: list[str]
    ) -> None:
        first = _alike(old, new)
        if len(old) == len(new) and old[first + 1 :] == new[first + 1 :]:
            if first < len(new):  # one of a thousand, as nearly always
                self._compare(f"{path},{first}", old[first], new[first], found)
            return
        last = _alike(old[first:][::-1], new[first:][::-1])
        before, after = old[first : len(old) - last], new[first : len(new) - last]
        if len(before) == len(after) and after and after[0] in before:
            # The oldest make room for others: else each would be written in another's place.
            gone = before.index(after[0])
            found.append(f'{{"p":[""{path}],"at":{first},"n":{gone},"v":[]}}')
            self._compare_tuples(path, old[:first] + old[first + gone :], new, found)
        elif len(before) == len(after):
            for at, (one, other) in enumerate(zip(before, after, strict=True), first):
                self._compare(f"{path},{at}", one, other, found)
        else:
            found.append(
                f'{{"p":[""{path}],"at":{first},"n":{len(before)},"v":{self._text(after)}}}'
            )

    def _text(self, value: object) -> str:
        plain = _PLAIN.get(type(value))
        if plain is not None:
            return plain(value)
        if isinstance(value, tuple):
            return f"[{','.join(map(self._text, value))}]"
        names = self._fields.get(type(value))
        if names is not None:
            parts = []
            for name in names:
                part = getattr(value, name)
                plain = _PLAIN.get(type(part)) or self._text
                parts.append(f'"{name}":{plain(part)}')
            content = ",".join(parts)
            return f'{{"c":"{type(value).__name__}","f":{{{content}}}}}'
        if isinstance(value, bytes):
            return f'{{"b":"{value.hex()}"}}'
        if isinstance(value, frozenset):
            return f'{{"s":{self._text(tuple(sorted(value, key=repr)))}}}'
        if isinstance(value, Enum) and type(value).__name__ in self._classes:
            return f'{{"e":"{type(value).__name__}","v":{self._text(value.value)}}}'
        raise TypeError(f"{type(value).__name__} is no part of the state")

    def _in(self, value: Any) -> object:
        if isinstance(value, list):
            return tuple(self._in(each) for each in value)
        if not isinstance(value, dict):
            return value
        if "b" in value:
            return bytes.fromhex(value["b"])
        if "s" in value:
            return frozenset(self._in(each) for each in value["s"])
        if "e" in value:
            return self._read[value["e"]](value["v"])
        known = self._read[value["c"]]
        names = self._fields[known]
        plain = _PLAIN
        return known(
            **{
                name: v if type(v) in plain else self._in(v)
                for name, v in value["f"].items()
                if name in names
            }
        )


def _alike(one: tuple[object, ...], other: tuple[object, ...]) -> int:
    """Return with how many equal items both begin.

    By halves, because a comparison of slices does not leave the interpreter's own code.
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _apply(tree: Any, change: Any) -> None:
    """Put one change into what json.loads() has made of a value."""
    *path, last = change["p"]
    holder = tree["f"]
    for step in path:
        inside = holder[step]
        holder = inside if isinstance(inside, list) else inside["f"]
    if "at" in change:
        holder[last][change["at"] : change["at"] + change["n"]] = change["v"]
    elif "less" in change:
        left = [each for each in holder[last]["s"] if each not in change["less"]]
        holder[last]["s"] = left + change["more"]
    else:
        holder[last] = change["v"]


class StateFile:
    """The memfd.  Owns its descriptor."""

    def __init__(self, fd: int) -> None:
        """Use a memfd that make() made, in this program or an earlier one."""
        self.fd = fd
        self._sequence = max((sequence for sequence, _, _ in self._slots()), default=0)
        self._whole_bytes = self._bytes = 0  # of what this program has written to the slot

    @classmethod
    def make(cls) -> StateFile:
        """Make an empty one.  Raises OSError."""
        return cls(os.memfd_create("sp.state", os.MFD_CLOEXEC))

    @property
    def empty(self) -> bool:
        """Whether nothing has ever been written."""
        return os.fstat(self.fd).st_size == 0

    @property
    def takes_changes(self) -> bool:
        """Whether a change may follow what this program has written; else all of it is due."""
        changes = self._bytes - self._whole_bytes
        return self._bytes > 0 and changes <= max(self._whole_bytes, _CHANGES_BYTES)

    def write(self, payload: bytes) -> None:
        """Replace the state.  Raises OSError, and then the one before still stands."""
        sequence = self._sequence + 1
        self._whole_bytes = self._bytes = self._put(_WHOLE, sequence, 0, payload)
        self._sequence = sequence

    def write_change(self, payload: bytes) -> None:
        """Add a change to the state.  Raises OSError, and then the one before still stands.

        Only where it takes changes.
        """
        self._bytes += self._put(_CHANGE, self._sequence, self._bytes, payload)

    def _put(self, kind: bytes, sequence: int, at: int, payload: bytes) -> int:
        header = _HEADER.pack(kind, FORMAT, sequence, len(payload))
        checksum = _CHECKSUM.pack(binascii.crc32(payload, binascii.crc32(header)))
        record = header + checksum + payload
        if at + len(record) > _SLOT_BYTES:
            raise OSError(28, "the state does not fit into its slot")
        written = os.pwrite(self.fd, record, sequence % 2 * _SLOT_BYTES + at)
        if written != len(record):
            raise OSError(28, "the state was written in part")
        return len(record)

    def read(self) -> tuple[bytes, ...]:
        """Return the newest whole state and its changes.

        Raises StateError when there is none, or when a newer program wrote it.
        """
        newest = max(self._slots(), default=None)
        if newest is None:
            raise StateError("there is no whole state in the memfd")
        sequence, form, payload = newest
        if form > FORMAT:
            raise StateError(
                f"the state was written by a newer program (format {form}, this one reads up to "
                f"{FORMAT}): start that one, or stop and start afresh"
            )
        found, at = [payload], _RECORD_BYTES + len(payload)
        while (change := self._record(sequence % 2, at)) and change[:2] == (_CHANGE, sequence):
            found.append(change[3])
            at += _RECORD_BYTES + len(change[3])
        return tuple(found)

    def _slots(self) -> list[tuple[int, int, bytes]]:
        """Return (sequence, format, payload) of each whole value."""
        found = [self._record(slot, 0) for slot in (0, 1)]
        return [(each[1], each[2], each[3]) for each in found if each and each[0] == _WHOLE]

    def _record(self, slot: int, at: int) -> tuple[bytes, int, int, bytes] | None:
        """Return (kind, sequence, format, payload) of a record, None where none is whole."""
        head = os.pread(self.fd, _RECORD_BYTES, slot * _SLOT_BYTES + at)
        if len(head) < _RECORD_BYTES:
            return None
        header, (checksum,) = head[: _HEADER.size], _CHECKSUM.unpack(head[_HEADER.size :])
        kind, form, sequence, length = _HEADER.unpack(header)
        if kind not in (_WHOLE, _CHANGE) or length > _SLOT_BYTES:
            return None
        payload = os.pread(self.fd, length, slot * _SLOT_BYTES + at + _RECORD_BYTES)
        if binascii.crc32(payload, binascii.crc32(header)) != checksum:
            return None
        return kind, sequence, form, payload

    def close(self) -> None:
        os.close(self.fd)
