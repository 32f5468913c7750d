"""The state that outlives the program: values in a memfd, written atomically.

The memfd holds two slots.  A slot begins with a whole value, and a record for each later change
follows.  Without change records, each of a thousand changes would write a thousand workers.  Once
the changes are longer than the value, a whole value goes to the other slot.  Each record has a
checksum, so if a program dies in the middle of a record, the earlier state stays valid.

The format of a value: model/codec.py.
"""

from __future__ import annotations

import os
import struct
import zlib

from ..model.codec import FORMAT, DecodeError, NewerError, need_format, refusal
from .cleanup import on_error

#: magic, format, sequence, length; then the checksum of these and the payload.  A change has the
#: same sequence as its whole value.
_HEADER = struct.Struct("<4sIQQ")
_CHECKSUM = struct.Struct("<I")
_RECORD_BYTES = _HEADER.size + _CHECKSUM.size  # without the payload
_WHOLE, _CHANGE = b"SPst", b"SPch"
#: The file is sparse: a slot takes only the memory that was written.
_SLOT_BYTES = 64 * 1024 * 1024
#: The file size that the limit of file sizes (RLIMIT_FSIZE) must allow.
MOST_BYTES = 2 * _SLOT_BYTES
#: No program writes so many states.
_LAST_SEQUENCE = 2**63
#: Changes may always be this long, even if the value is shorter.
_CHANGES_BYTES = 16 * 1024


class StateError(Exception):
    """The state cannot be used; the message says why."""


class NewerStateError(StateError):
    """A newer version has written the state, so that version can use it."""


def unreadable(error: DecodeError) -> StateError:
    """Return the error for a state that cannot be decoded."""
    kind = NewerStateError if isinstance(error, NewerError) else StateError
    return kind(refusal("the state", error))


class StateFile:
    """The memfd of the state.  Owns its descriptor."""

    def __init__(self, fd: int) -> None:
        """Use the memfd that make() returned, in this program or an earlier one."""
        self.fd = fd
        self._sequence = max((sequence for sequence, _, _ in self._slots()), default=0)
        self._whole_bytes = self._bytes = 0  # the bytes that this program has written to the slot

    @classmethod
    def make(cls) -> StateFile:
        """Return an empty state file.  Raises OSError."""
        return cls(os.memfd_create("sp.state", os.MFD_CLOEXEC))

    @property
    def empty(self) -> bool:
        """Whether no state has been written."""
        return os.fstat(self.fd).st_size == 0

    @property
    def takes_changes(self) -> bool:
        """Whether write_change() is allowed; otherwise a whole state is due."""
        changes = self._bytes - self._whole_bytes
        return self._bytes > 0 and changes <= max(self._whole_bytes, _CHANGES_BYTES)

    def write(self, payload: bytes) -> None:
        """Replace the state.  Raises OSError; the earlier state then stays valid."""
        sequence = self._sequence + 1
        self._whole_bytes = self._bytes = self._put(_WHOLE, sequence, 0, payload)
        self._sequence = sequence

    def write_change(self, payload: bytes) -> None:
        """Add a change to the state; allowed only if takes_changes.

        Raises OSError; the earlier state then stays valid.
        """
        self._bytes += self._put(_CHANGE, self._sequence, self._bytes, payload)

    def copy(self) -> int:
        """Return the descriptor of a new memfd with the same state.  Raises OSError, StateError."""
        copied = StateFile.make()
        with on_error(os.close, copied.fd):
            whole, *changes = self.read()
            copied.write(whole)
            for each in changes:
                copied.write_change(each)
        return copied.fd

    def _put(self, kind: bytes, sequence: int, at: int, payload: bytes) -> int:
        header = _HEADER.pack(kind, FORMAT, sequence, len(payload))
        checksum = _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(header)))
        record = header + checksum + payload
        if at + len(record) > _SLOT_BYTES:
            raise OSError(28, "the state does not fit into its slot")
        written = os.pwrite(self.fd, record, sequence % 2 * _SLOT_BYTES + at)
        if written != len(record):
            raise OSError(28, "the state was written in part")
        return len(record)

    def read(self) -> tuple[bytes, ...]:
        """Return the newest whole state and its changes.

        Raises StateError if there is no state, or if it has another format.
        """
        newest = max(self._slots(), default=None)
        if newest is None:
            raise StateError("there is no whole state in the memfd")
        sequence, form, payload = newest
        try:
            need_format(form)
        except DecodeError as error:
            raise unreadable(error) from error
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
        """Return (kind, sequence, format, payload) of a record, None if no intact one is there."""
        head = os.pread(self.fd, _RECORD_BYTES, slot * _SLOT_BYTES + at)
        if len(head) < _RECORD_BYTES:
            return None
        header, (checksum,) = head[: _HEADER.size], _CHECKSUM.unpack(head[_HEADER.size :])
        kind, form, sequence, length = _HEADER.unpack(header)
        if kind not in (_WHOLE, _CHANGE) or length > _SLOT_BYTES or sequence > _LAST_SEQUENCE:
            return None
        payload = os.pread(self.fd, length, slot * _SLOT_BYTES + at + _RECORD_BYTES)
        if zlib.crc32(payload, zlib.crc32(header)) != checksum:
            return None
        return kind, sequence, form, payload
