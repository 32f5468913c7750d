"""What outlives the program: values in a memfd, written whole or not at all.

The memfd holds two slots, each with a sequence number and a checksum.  A write goes to
the slot that is not the newest, so whoever dies in the middle of it leaves the one before.

Values are told by name (class and field), so that a newer program reads what an older one
wrote: fields it does not find take their defaults.  The other way round is refused in words.
"""

from __future__ import annotations

import binascii
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Grows when an older program could not make sense of what is written.
FORMAT = 1

#: magic, format, sequence, length, checksum of all before and of the payload
_HEADER = struct.Struct("<4sIQQ")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"SPst"
#: The file is sparse: a slot takes the memory of what was written to it.
_SLOT_BYTES = 64 * 1024 * 1024


#: What json.dumps() would say, without its preparations.
_PLAIN: Mapping[type, Callable[[Any], str]] = {
    str: json.encoder.encode_basestring_ascii,
    int: int.__repr__,
    float: json.dumps,
    bool: json.dumps,
    type(None): json.dumps,
}


class StateError(Exception):
    """The state cannot be used; the message says why."""


class Codec:
    """Turns values of known classes into JSON and back."""

    def __init__(self, classes: Iterable[type]) -> None:
        """classes: the frozen dataclasses and enums that may occur, each of another name."""
        self._classes: Mapping[str, type] = {each.__name__: each for each in classes}
        self._fields: dict[type, tuple[str, ...]] = {
            each: tuple(field.name for field in fields(each))
            for each in self._classes.values()
            if is_dataclass(each)
        }
        # The last encoding's values and their texts: they do not change, and most of them are
        # in the next one too.
        self._texts: dict[int, tuple[object, str]] = {}
        self._used: dict[int, tuple[object, str]] = {}

    def encode(self, value: object) -> bytes:
        """Return a value of these classes, tuples, frozensets and plain JSON as bytes.

        Raises TypeError for anything else.
        """
        text = self._text(value)
        self._texts, self._used = self._used, {}
        return text.encode()

    def decode(self, data: bytes) -> Any:
        """Return the value that was encoded.  Raises StateError for what is none."""
        try:
            return self._in(json.loads(data))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state cannot be read: {error!r}") from error

    def _text(self, value: object) -> str:
        plain = _PLAIN.get(type(value))
        if plain is not None:
            return plain(value)
        if isinstance(value, tuple):
            return f"[{','.join(map(self._text, value))}]"
        names = self._fields.get(type(value))
        if names is not None:
            return self._of_class(value, names)
        if isinstance(value, bytes):
            return f'{{"b":"{value.hex()}"}}'
        if isinstance(value, frozenset):
            return f'{{"s":{self._text(tuple(sorted(value, key=repr)))}}}'
        if isinstance(value, Enum) and type(value).__name__ in self._classes:
            return f'{{"e":"{type(value).__name__}","v":{json.dumps(value.value)}}}'
        raise TypeError(f"{type(value).__name__} is no part of the state")

    def _of_class(self, value: object, names: Iterable[str]) -> str:
        known = self._texts.get(id(value))
        if known is None:  # as long as one is kept its id is no other's
            content = ",".join(f'"{name}":{self._text(getattr(value, name))}' for name in names)
            known = value, f'{{"c":"{type(value).__name__}","f":{{{content}}}}}'
        self._used[id(value)] = known
        return known[1]

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
            return self._classes[value["e"]](value["v"])
        known = self._classes[value["c"]]
        names = {each.name for each in fields(known)}
        return known(**{name: self._in(v) for name, v in value["f"].items() if name in names})


class StateFile:
    """The memfd.  Owns its descriptor."""

    def __init__(self, fd: int) -> None:
        """Use a memfd that make() made, in this program or an earlier one."""
        self.fd = fd
        self._sequence = max((sequence for sequence, _, _ in self._slots()), default=0)

    @classmethod
    def make(cls) -> StateFile:
        """Make an empty one.  Raises OSError."""
        return cls(os.memfd_create("sp.state", os.MFD_CLOEXEC))

    @property
    def empty(self) -> bool:
        """Whether nothing has ever been written."""
        return os.fstat(self.fd).st_size == 0

    def write(self, payload: bytes) -> None:
        """Replace the state.  Raises OSError, and then the one before still stands."""
        sequence = self._sequence + 1
        header = _HEADER.pack(_MAGIC, FORMAT, sequence, len(payload))
        checksum = _CHECKSUM.pack(binascii.crc32(payload, binascii.crc32(header)))
        record = header + checksum + payload
        if len(record) > _SLOT_BYTES:
            raise OSError(28, "the state does not fit into its slot")
        written = os.pwrite(self.fd, record, sequence % 2 * _SLOT_BYTES)
        if written != len(record):
            raise OSError(28, "the state was written in part")
        self._sequence = sequence

    def read(self) -> bytes:
        """Return the newest whole state.

        Raises StateError when there is none, or when a newer program wrote it.
        """
        newest = max(self._slots(), default=None)
        if newest is None:
            raise StateError("there is no whole state in the memfd")
        _, form, payload = newest
        if form > FORMAT:
            raise StateError(
                f"the state was written by a newer program (format {form}, this one reads up to "
                f"{FORMAT}): start that one, or stop and start afresh"
            )
        return payload

    def _slots(self) -> list[tuple[int, int, bytes]]:
        """Return (sequence, format, payload) of each whole slot."""
        found = []
        for slot in (0, 1):
            at = slot * _SLOT_BYTES
            head = os.pread(self.fd, _HEADER.size + _CHECKSUM.size, at)
            if len(head) < _HEADER.size + _CHECKSUM.size:
                continue
            header, (checksum,) = head[: _HEADER.size], _CHECKSUM.unpack(head[_HEADER.size :])
            magic, form, sequence, length = _HEADER.unpack(header)
            if magic != _MAGIC or length > _SLOT_BYTES:
                continue
            payload = os.pread(self.fd, length, at + len(head))
            if binascii.crc32(payload, binascii.crc32(header)) == checksum:
                found.append((sequence, form, payload))
        return found

    def close(self) -> None:
        os.close(self.fd)
