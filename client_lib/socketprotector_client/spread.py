"""Ends the connections of a draining worker evenly over a time, for clients that reconnect at once.

Under --drain-spread or --stop-spread a draining worker does not keep its connections until their
clients leave: each connection has its own turn.  Those without a byte for the last second have the
first turns.  At its turn a connection gets an end of file (SHUT_RD): the handler reads what the
client has sent, then the end, and may still write.  Nothing here closes a connection.

In the scoreboard, the protector sets the time by which all connections should have ended.  Only the
protector knows whether this is a reload or a stop, and how many other workers are ending.  If a
stop begins during a drain, the protector may set an earlier time.  Without a scoreboard the
environment's time counts.

A separate thread does all of this, because every thread of the program may be busy.

Source: docs/protocol.md, section "A spread"; tcp_info in linux/tcp.h; shutdown(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import termios
import time
import weakref
from collections import deque
from contextlib import contextmanager

from . import fork_hook, system, wire
from .connection import Connection, OpenConnections
from .log import Logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Deque, Dict, Iterator, List, Optional, Set, Tuple, Union

    from .drain_state import Drain
    from .scoreboard import Scoreboard

    #: A weak reference to a connection, or the descriptor of a detached one.
    Entry = Union[weakref.ref[Connection], int]
    Place = Tuple["_Opened", Entry]

_log = Logger(__name__)

#: How often connections end, and how often the open ones are counted.
_TICK_S, _COUNT_S = 0.1, 1.0
#: A connection without a byte for this long is idle.
_IDLE_MS = 1000
#: A client that awaits an answer keeps its connection for _PATIENCE_S after its turn, or for
#: _PATIENCE_PART of the whole time if that is less.
_PATIENCE_S, _PATIENCE_PART = 30.0, 0.05
#: How many connections to examine before other threads may run.
_AT_ONCE = 256

#: struct tcp_info: the offsets of tcpi_last_data_sent and tcpi_last_data_recv (milliseconds ago),
#: and of tcpi_bytes_acked, before tcpi_bytes_received.
_LAST_SENT_AT, _LAST_RECEIVED_AT, _BYTES_ACKED_AT, _TCP_INFO_BYTES = 44, 52, 120, 136
#: The handshake counts as one acknowledged byte.
_SYN = 1


class Spread:
    """The turns of all connections of this process."""

    def __init__(self, drain: Drain, seconds: float, board: Scoreboard) -> None:
        """seconds: the time in which the connections end, unless the protector sets another."""
        self._drain = drain
        self._seconds = seconds
        # A forked child reads its parent's record, too: both drain for the same reason.
        self._words = board.words
        self._opened: List[weakref.ref[_Opened]] = []
        #: Ends connections in the program's own way, by descriptor; without it: by end of file.
        self.end: Optional[Callable[[List[int]], None]] = None
        self.after_fork_in_child()
        fork_hook.register(self)

    def after_fork_in_child(self) -> None:
        #: Whether the turn of each connection has come, or the drain ends no connection.
        self.over = False
        self._armed = self._all_due = self._said = False
        #: The inodes of the connections whose turn has come.
        self._due: Set[int] = set()
        for each in self._live():
            each.forget_parents()

    def _live(self) -> List[_Opened]:
        found = [each() for each in self._opened]
        return [each for each in found if each is not None]

    def open_connections(self, on_change: Callable[[], None]) -> OpenConnections:
        """Return a new set of connections that have their turns."""
        found = _Opened(on_change, self)
        self._opened = [*map(weakref.ref, self._live()), weakref.ref(found)]
        return found

    def arm(self) -> None:
        """Begin to wait for the drain, once in each process.  Starts a thread."""
        if not self._armed:
            self._armed = True
            if self._words is not None:
                self._words[wire.BOARD_SPREADS] = 1
            self._drain.on_begin(self._begin)

    def is_due(self, fd: int) -> bool:
        """Return whether the turn of the connection with this descriptor has come."""
        if self.over or self._all_due or not self._armed:
            return True
        try:
            return os.fstat(fd).st_ino in self._due
        except OSError:
            return True  # it has ended

    def wait(self, still: Callable[[], bool]) -> None:
        """Wait until the spread is over, or still() is false."""
        while not self.over and still():
            _sleep(_TICK_S / 2)

    # -- the thread ----------------------------------------------------------------

    def _begin(self) -> None:
        try:
            # Not in the thread of the drain's callbacks: other callbacks must not wait.
            system.start_thread(self._run, ())
        except RuntimeError as error:
            self.over = True
            self._say(error)

    def _run(self) -> None:
        try:
            self._end_all()
        except Exception:
            _log.exception("cannot end connections evenly")
        finally:
            self.over = True

    def _say(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            _log.error("cannot end connections evenly: %s", error)

    def _until(self, began: float) -> Optional[float]:
        """Return the time by which all connections should have ended; None: they are not ended."""
        ordered = self._words[wire.BOARD_SPREAD_UNTIL] if self._words is not None else 0
        if ordered == wire.SPREAD_NEVER or not (ordered or self._seconds):
            return None
        return ordered / 1e9 if ordered else began + self._seconds

    def _end_all(self) -> None:
        began = now = time.monotonic()
        turns, found_at, portion = _Turns(self), 0.0, 0.0
        while True:
            until = self._until(began)
            before, now = now, time.monotonic()
            self.over = until is None or now >= until
            self._all_due = self._all_due or until is None
            try:
                if until is not None and now >= found_at + _COUNT_S:
                    turns.find()
                    found_at = now = time.monotonic()
                if until is not None and not self.over:
                    # The last turn comes patience_s before the end, so that its client has as much
                    # time as the others.
                    patience_s = min(_PATIENCE_S, (until - began) * _PATIENCE_PART)
                    left_s = until - patience_s - before
                    # If time was lost, for example at the first count, do not catch up at once: let
                    # the remaining turns come a little faster.
                    most_s = min(_COUNT_S, max(3 * _TICK_S, (until - began) / 600))
                    passed_s = min(now - before, most_s)
                    portion += len(turns) * min(1.0, passed_s / max(left_s, _TICK_S))
                    turns.next(int(portion))
                    portion %= 1.0
                    turns.end_late(now, patience_s)
                elif until is not None:
                    turns.next(len(turns))
                    turns.end_late(now, 0.0)
            except OSError as error:  # no descriptor is free: the next round does more
                self._say(error)
            _sleep(_COUNT_S if self.over else _TICK_S)

    def places(self) -> List[Place]:
        """Return the open connections of this process."""
        return [(each, entry) for each in self._live() for entry in each.entries()]

    def note_due(self, inode: int) -> None:
        """Let is_due() know that the turn of a connection has come."""
        self._due.add(inode)


class _Opened(OpenConnections):
    """Connections that have their turns.  In a child: without those of its parent."""

    def __init__(self, on_change: Callable[[], None], spread: Spread) -> None:
        super().__init__(on_change)
        self._spread = spread
        self._parents: Set[Entry] = set()

    def add(self, connection: Connection) -> None:
        super().add(connection)
        self._spread.arm()  # for a forked child, whose parent has sent READY=1

    def forget_parents(self) -> None:
        """Leave out the connections that were open at a fork."""
        self._parents = set(self._open)

    def entries(self) -> List[Entry]:
        """Return the open connections, in any order."""
        found = list(self._open)
        return [each for each in found if each not in self._parents] if self._parents else found

    def copy(self, entry: Entry) -> int:
        """Return a second descriptor of a connection, which the caller closes; -1: it has ended.

        Another thread might close the first descriptor, and then its number might belong to another
        connection at our next system call.  Raises OSError if no descriptor is free.
        """
        connection = None if isinstance(entry, int) else entry()
        fd = entry if isinstance(entry, int) else connection.fileno() if connection else -1
        if fd < 0:
            return -1
        try:
            copy = os.dup(fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                return -1
            raise
        if isinstance(entry, int):
            is_same = os.fstat(copy).st_ino == self._detached.get(entry)
        else:
            is_same = connection is not None and connection.fileno() == fd
        if is_same:
            return copy
        os.close(copy)
        return -1


class _Turns:
    """The order of the turns, and the connections that are still open after theirs."""

    def __init__(self, spread: Spread) -> None:
        self._spread = spread
        self._waiting: Deque[Place] = deque()
        self._known: Set[Place] = set()
        self._late: Dict[Place, float] = {}  # -> the time of the turn

    def __len__(self) -> int:
        """Return about how many connections wait for their turns."""
        return len(self._waiting)

    def find(self) -> None:
        """Add the connections that are new, idle ones first, and leave out ended ones."""
        present = self._spread.places()
        new = [each for each in present if each not in self._known]
        self._known = set(present)
        self._waiting = deque(each for each in self._waiting if each in self._known)
        ranked: Tuple[List[Place], ...] = [], [], []
        for number, place in enumerate(new):
            is_idle = is_answered = False
            try:
                with _copied(place) as fd:
                    is_idle, is_answered = _state_of(fd)
            except OSError:
                pass  # no descriptor is free
            ranked[2 - is_idle - (is_idle and is_answered)].append(place)
            if number % _AT_ONCE == _AT_ONCE - 1:
                _sleep(0.0)
        for each in ranked:
            self._waiting.extend(each)

    def next(self, count: int) -> None:
        """Let the turns of `count` open connections come."""
        own = self._spread.end
        if own is not None:
            self._next_own(count, own)
            return
        now = time.monotonic()
        while count > 0 and self._waiting:
            place = self._waiting[0]
            with _copied(place) as fd:
                self._waiting.popleft()
                if fd < 0:
                    continue
                count -= 1
                self._spread.note_due(os.fstat(fd).st_ino)
                if _state_of(fd)[1]:
                    _end(fd)
                    continue
            self._late[place] = now

    def _next_own(self, count: int, own: Callable[[List[int]], None]) -> None:
        # Without a system call: after each one, a busy event loop would keep this thread waiting.
        now = time.monotonic()
        numbers: List[int] = []
        while count > len(numbers) and self._waiting:
            place = self._waiting.popleft()
            number = _number_of(place[1])
            if number >= 0:
                self._late[place] = now
                numbers.append(number)
        if numbers:
            own(numbers)

    def end_late(self, now: float, patience_s: float) -> None:
        """End each connection whose client got an answer since its turn, or waited patience_s.

        If the program ends connections in its own way, end only those that are still open after
        patience_s and whose client awaits no answer.
        """
        is_own = self._spread.end is not None
        for place, since in list(self._late.items()):
            if is_own and now - since < patience_s:
                continue
            with _copied(place) as fd:
                if fd >= 0:
                    is_answered, is_over = _state_of(fd)[1], now - since >= patience_s
                    if not (is_answered and is_over if is_own else is_answered or is_over):
                        continue
                    _end(fd)
            del self._late[place]


@contextmanager
def _copied(place: Place) -> Iterator[int]:
    """Lend a second descriptor of a connection; -1: it has ended."""
    opened, entry = place
    fd = opened.copy(entry)
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def _number_of(entry: Entry) -> int:
    if isinstance(entry, int):
        return entry
    connection = entry()
    return connection.fileno() if connection is not None else -1


def _state_of(fd: int) -> Tuple[bool, bool]:
    """Return whether a connection is idle, and whether its client has got all answers.

    A client awaits an answer if it has sent bytes since it last got a byte.  If the kernel does not
    record these times, as for a UNIX socket, only unread bytes count.
    """
    if fd < 0:
        return True, True
    borrowed = system.Socket(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
    try:
        if struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]:
            return False, False
        found = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return True, True
    finally:
        borrowed.detach()
    if len(found) < _TCP_INFO_BYTES:
        return True, True
    (sent_ms,) = struct.unpack_from("I", found, _LAST_SENT_AT)
    (received_ms,) = struct.unpack_from("I", found, _LAST_RECEIVED_AT)
    acked, received = struct.unpack_from("2Q", found, _BYTES_ACKED_AT)
    # Before the first byte is sent to the client, sent_ms counts from the accept.
    is_answered = not received or (sent_ms <= received_ms and acked > _SYN)
    return min(sent_ms, received_ms) >= _IDLE_MS, is_answered


def _end(fd: int) -> None:
    """Give end of file to the program that reads a connection; the program may still write."""
    borrowed = system.Socket(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
    try:
        borrowed.shutdown(socket.SHUT_RD)
    except OSError:
        pass  # the client has disconnected
    finally:
        borrowed.detach()


def _sleep(seconds: float) -> None:
    # Not time.sleep, which gevent replaces.
    system.poll().poll(seconds * 1000)
