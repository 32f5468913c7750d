"""Connections that wait to be sent again, in memory."""

from __future__ import annotations

from collections.abc import Callable

from socketprotector.daemon.delivery.queue.undelivered import listener_of


class Kept:
    """As Undelivered, without descriptors."""

    def __init__(self) -> None:
        self.waiting: list[tuple[bytes, int]] = []
        self.writable = True
        self.number = 0  # of those kept by keep_older()
        self._older: dict[int, int] = {}  # descriptor -> its number

    def has(self, wanted: Callable[[int], bool]) -> bool:
        return any(wanted(listener_of(header)) for header, _ in self.waiting)

    def keep_first(self, header: bytes, fd: int) -> None:
        self.waiting.insert(0, (header, fd))

    def keep_older(self, header: bytes, fd: int, number: int) -> None:
        older = [self._older.get(each, 0) <= number for _, each in self.waiting]
        self.waiting.insert([*older, True].index(True), (header, fd))
        self.number = self._older[fd] = self.number + 1

    def keep_last(self, header: bytes, fd: int) -> None:
        self.waiting.append((header, fd))

    def take(self, wanted: Callable[[int], bool]) -> tuple[bytes, int] | None:
        found = next(each for each in self.waiting if wanted(listener_of(each[0])))
        if not self.writable:
            return None
        self.waiting.remove(found)
        return found
