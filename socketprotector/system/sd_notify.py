"""The sd_notify protocol in both directions: from workers to us, and from us to systemd.

systemd's variables, and the modules that read them: LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES in
launch/activation.py (the resident process: inherited.py); NOTIFY_SOCKET in daemon/parents.py;
WATCHDOG_USEC, WATCHDOG_PID and FDSTORE here; INVOCATION_ID in daemon/parents.py; JOURNAL_STREAM in
terminal.py; RUNTIME_DIRECTORY in launch/preflight.py.  For variables of workers see
daemon/worker_spawn.py.

Source: sd_notify(3); unix(7) for SCM_CREDENTIALS.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from . import peer_credentials
from .cleanup import on_error
from .foreign_descriptors import close_unread, dropping
from .inherited import Named

#: The file name under which each socket is first bound.
_BOUND_NAME = "new"
#: Longer datagrams are cut; systemd's own limit is a page.
_MAX_BYTES = 4096
#: Errors that mean a slow manager or a shortage; any other error means that the manager is gone.
_LATER = frozenset(
    {errno.EAGAIN, errno.EINTR, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE}
)
#: Without FDPOLL=0 systemd drops descriptors that hang up, such as a draining channel.
_STORE = "FDSTORE=1\nFDNAME={}\nFDPOLL=0"
#: The key of the timer that feeds the watchdog.
WATCHDOG = "watchdog"
#: Room for descriptors outside the store: standard files, sockets of .socket units, and files that
#: the next program opens before it raises its limit.
_NOT_STORED = 64
#: The digits of a 64-bit number, the longest in systemd's variables.
_USEC_DIGITS = 20
_DESCRIPTOR = struct.Struct("i")
#: systemd ignores a datagram above 4,096 bytes, also its READY=1.  A character has up to 6 bytes.
_MOST_CHARACTERS = 600
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_CREDENTIALS = struct.Struct("3i")
_SENDER_BYTES = socket.CMSG_SPACE(_CREDENTIALS.size)


class NotifySocket:
    """The socket on which one worker sends messages to us.  Its address identifies the worker."""

    def __init__(self, bound: socket.socket, address: str, allowed_uids: frozenset[int]) -> None:
        """Take ownership of a socket that make() bound to the address."""
        self.socket = bound
        self.address = address
        self._is_abstract = address.startswith("@")
        # Any process can send to an abstract name, so there a uid must identify a single user.
        # Only processes that know the path can send to the path.
        self._allowed = allowed_uids
        if self._is_abstract:
            self._allowed = peer_credentials.unmistakable_users(allowed_uids)

    @classmethod
    def make(cls, address: str, allowed_uids: frozenset[int]) -> NotifySocket:
        """Bind a path in our own folder, or an abstract address (`@name`).  Raises OSError.

        No other process can guess the path or the name.
        """
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with on_error(bound.close):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            if address.startswith("@"):
                bound.bind(_bound_as(address))
            else:
                _bind_path(bound, address)
        return cls(bound, address, allowed_uids)

    def fileno(self) -> int:
        return self.socket.fileno()

    def peek(self, pid: int) -> Mapping[str, str] | None:
        """Return the assignments of the next message, None without a message.  Raises OSError.

        The message stays until remove(): if this program is killed before it records the message,
        the next program reads it.

        A message counts if the worker (pid) or an allowed user sent it: a sender may have exited,
        and a worker may have changed its user.  Any other message counts as empty.
        """
        try:
            # Without room for descriptors the kernel creates none.
            data, ancillary, _, _ = self.socket.recvmsg(
                _MAX_BYTES, _SENDER_BYTES, socket.MSG_DONTWAIT | socket.MSG_PEEK
            )
        except (BlockingIOError, InterruptedError):
            return None
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                sender, uid, _ = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])
                if sender == pid or uid in self._allowed:
                    return parse(data)
        return {}

    def remove(self) -> None:
        """Remove the message that peek() returned; the kernel drops its descriptors.

        The sender of a BARRIER learns from that drop that all messages were handled.  Raises
        OSError.
        """
        with dropping():
            self.socket.recv(1, socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Close the socket, and remove its file."""
        close_unread(self.socket)
        if not self._is_abstract:
            _remove(self.address)


def _bound_as(address: str) -> str:
    """Return an address in the kernel's form: an abstract name begins with a NUL."""
    return "\0" + address[1:] if address.startswith("@") else address


def _bind_path(bound: socket.socket, path: str) -> None:
    """Bind a path that /proc/net/unix does not reveal: it shows the name that was bound first.

    The folder's permissions decide which users may send.
    """
    temporary = os.path.join(os.path.dirname(path), _BOUND_NAME)
    _remove(temporary)
    bound.bind(temporary)
    with on_error(_remove, temporary):
        os.chmod(temporary, 0o666)
        os.rename(temporary, path)


def _remove(path: str, folder: int | None = None) -> None:
    with suppress(OSError):  # removed already
        os.unlink(path, dir_fd=folder)


def remove_folder(path: str) -> None:
    """Remove the folder of notify sockets, if removable, with files that killed programs left."""
    with suppress(OSError):
        # Root must not follow a link that the folder's user has put in the folder's place.
        folder = os.open(path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in os.listdir(folder):
                _remove(name, folder)
        finally:
            os.close(folder)
    with suppress(OSError):
        os.rmdir(path)


def _is_number(text: str) -> bool:
    # isdigit() alone is also true for digits that int() refuses.
    return text.isascii() and text.isdigit() and len(text) <= _USEC_DIGITS


def parse(data: bytes) -> dict[str, str]:
    """Return the NAME=VALUE lines of a datagram, without other lines."""
    # A C program may send its string with the final NUL, which systemd permits.
    text = data.removesuffix(b"\0").decode("utf-8", "replace")
    lines = (line.partition("=") for line in text.split("\n"))
    return {name: value for name, found, value in lines if found and name}


class Outbox:
    """Messages to a service manager, in order.  Never blocks, never raises.

    Unsent messages are kept: a manager that misses READY=1 stops us after its timeout, and a
    manager that misses a descriptor cannot return it.
    """

    def __init__(
        self,
        later: Callable[[Callable[[], None]], None],
        line: socket.socket | None = None,
        address: str = "",
    ) -> None:
        """Send over a connected line, which it owns, or to an address; without both, send nothing.

        later: calls its argument after a short pause.
        """
        self._later = later
        # Do not connect: a restarted manager has another socket under the same name.
        self._to = (_bound_as(address),) if address else ()
        if line is None and address:
            # Keep it for life: we must feed the watchdog even without a free descriptor.
            line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._line = line
        #: Text -> copy of a descriptor, -1 for none.
        self._unsent: dict[bytes, int] = {}

    @property
    def open(self) -> bool:
        return self._line is not None

    @property
    def waiting(self) -> bool:
        """Whether a message could not be sent yet."""
        return bool(self._unsent)

    def send(self, text: str, fd: int = -1) -> bool:
        """Send a message, with a copy of `fd` if given; return False if `fd` cannot be copied."""
        if self._line is None:
            return True
        try:
            copy = os.dup(fd) if fd >= 0 else -1
        except OSError:
            return False
        # A file name in a status need not be UTF-8.
        data = text.encode("utf-8", "backslashreplace")
        # Keep one copy of each text: watchdog messages must not pile up; the last must stay last.
        self._drop(data)
        self._unsent[data] = copy
        self._flush()
        return True

    def withdraw(self, text: str) -> bool:
        """Drop an unsent message with its descriptor; return False if there is none."""
        return self._drop(text.encode("utf-8", "backslashreplace"))

    def _drop(self, data: bytes) -> bool:
        fd = self._unsent.pop(data, None)
        if fd is not None and fd >= 0:
            os.close(fd)
        return fd is not None

    def _flush(self) -> None:
        while self._line is not None and self._unsent:
            data, fd = next(iter(self._unsent.items()))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(fd))]
            try:
                self._line.sendmsg([data], rights if fd >= 0 else [], _FLAGS, *self._to)
            except OSError as error:
                if error.errno in _LATER:
                    self._later(self._flush)
                    return
                # After any other error the manager is gone, or refuses our messages.
            self._drop(data)

    def finish(self, seconds: float) -> None:
        """Send the unsent messages, waiting for room for up to `seconds`; then close."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        if self._line is not None:
            # Connect: an unconnected datagram socket polls as writable even if the peer is full.
            with suppress(OSError):  # without a peer each message fails anyway
                for address in self._to:
                    self._line.connect(address)
            poll.register(self._line, select.POLLOUT)
        while self._unsent and (left_s := deadline - time.monotonic()) > 0:
            poll.poll(left_s * 1000)
            self._flush()
        self.close()

    def close(self) -> None:
        """Close the line, and drop the unsent messages."""
        if self._line is not None:
            self._line.close()
            self._line = None
        for data in tuple(self._unsent):
            self._drop(data)


def room_of(environment: Mapping[str, str], soft_limit: int) -> int:
    """Return the number of descriptors that a service manager can store and pass on.

    soft_limit: the descriptor limit that the manager has set for us.  Before systemd passes the
    stored descriptors to the next program, it sets this limit; with more descriptors the start
    fails.

    Source: systemd.exec(5), $FDSTORE (since systemd 254); exec_child() in its sources.
    """
    stored = environment.get("FDSTORE", "")
    most = max(0, soft_limit - _NOT_STORED)
    return min(int(stored), most) if _is_number(stored) else most


class Store:
    """The fd store that keeps our descriptors for the next program: systemd, or the guard.

    Source: sd_notify(3), FDSTORE=1 and FDSTOREREMOVE=1.
    """

    def __init__(
        self,
        outbox: Outbox,
        kept: Iterable[str] = (),
        *,
        most: int = sys.maxsize,
        names_bytes: int = sys.maxsize,
    ) -> None:
        """Use the store behind an outbox.

        kept: the names of descriptors that came from the store.
        most: the most descriptors; names_bytes: the most bytes of their names, each with a
        separator.
        """
        self._outbox = outbox
        #: The names of the stored descriptors.
        self.kept = set(kept)
        self._most, self._names_bytes = most, names_bytes
        self._bytes = sum(len(name) + 1 for name in self.kept)
        #: Not stored, because the store was full.  In this order they are stored later, so that one
        #: worker's room goes to one other worker.  A worker stored in part would be lost, too.
        self._left_out: dict[str, None] = {}
        self._few: set[str] = set()  # the names in the last sync()'s argument `few`
        self._due = dict.fromkeys(kept)  # to be stored, or to be forgotten

    @property
    def flushed(self) -> bool:
        """Whether all messages to the store have been sent."""
        return not self._outbox.waiting

    @property
    def keeps(self) -> bool:
        """Whether there is a store."""
        return self._outbox.open

    @property
    def complete(self) -> bool:
        """Whether the last sync() has stored or removed all that it should."""
        return not self._due

    def has(self, wanted: Iterable[str]) -> bool:
        """Return whether all of these were sent to the store, or left out by a full store."""
        return not self.keeps or (
            self.flushed and self.kept.union(self._left_out).issuperset(wanted)
        )

    def holds(self, names: Iterable[str]) -> bool:
        """Return whether all of these are in the store."""
        return self.keeps and self.kept.issuperset(names)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The names of the descriptors without room in the store: a kill loses their workers."""
        return tuple(self._left_out)

    def sync(
        self,
        few: Mapping[str, int],
        many: Named | None = None,
        write_state: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Make the store hold exactly these descriptors, by name.  The caller still owns them.

        A name is never reused for another descriptor, so only names are compared; of `many` only
        the changed names.
        write_state: called once the new descriptors are stored.  If it returns False, the previous
        state stays valid, so no descriptor is removed and sync() returns False.
        """
        if not self.keeps:
            if many is not None:
                many.changed.clear()  # otherwise each worker's name would stay in it
            return True
        before, due = self._few, self._due
        due.update(dict.fromkeys(before ^ few.keys()))
        due.update(dict.fromkeys((*self.kept, *self._left_out)) if many is None else many.changed)
        many = Named() if many is None else many
        many.changed.clear()
        # New descriptors first: they may replace old ones, and we may be killed in between.
        # Keep the given order: the most important descriptors come first.
        given = self._give_all(few, many)
        if not write_state():
            self._few = before | few.keys()
            return False
        for name in tuple(due):
            if name not in few and name not in many and (given or name not in before):
                self.forget(name)
                del due[name]
        self._give_all(few, many)  # there may be room by now
        self._few = before & due.keys() | few.keys()
        return True

    def _give_all(self, few: Mapping[str, int], many: Named) -> bool:
        """Store what is not stored yet; return False if one of `few` must be tried again later."""
        given = [self._give(name, few[name]) for name in few]
        for name in tuple(self._left_out):
            if name in many:
                if not self._has_room(name):
                    break
                self._give(name, many[name])
        for name in tuple(self._due):
            if name in many:
                self._give(name, many[name])
        return all(given)

    def _has_room(self, name: str) -> bool:
        return self._bytes + len(name) < self._names_bytes and len(self.kept) < self._most

    def _give(self, name: str, fd: int) -> bool:
        """Store a descriptor; return False if that must be tried again later."""
        if name not in self.kept:
            if not self._has_room(name):
                self._left_out[name] = None  # trying again would not help
            elif self._outbox.send(_STORE.format(name), fd):
                self._left_out.pop(name, None)
                self.kept.add(name)
                self._bytes += len(name) + 1
            else:
                self._due[name] = None
                return False
        self._due.pop(name, None)
        return True

    def forget(self, name: str) -> None:
        """Remove a descriptor from the store."""
        self._left_out.pop(name, None)
        if name not in self.kept:
            return
        # Withdraw an unsent message: its copy keeps a connection open that a worker has closed.
        if not self._outbox.withdraw(_STORE.format(name)):
            self._outbox.send(f"FDSTOREREMOVE=1\nFDNAME={name}")
        self.kept.discard(name)
        self._bytes -= len(name) + 1


class Systemd:
    """The service manager that started us, if any, and the guard: both get the same messages."""

    def __init__(self, environment: Mapping[str, str], pid: int, *outboxes: Outbox) -> None:
        """Send to all outboxes, first to NOTIFY_SOCKET.  pid: the service's main process."""
        self.pid = pid
        self._outboxes = outboxes
        usec = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        wanted = ours and outboxes[0].open and _is_number(usec)
        #: Seconds between two WATCHDOG=1, half of the allowed time; 0 without a watchdog.
        self.watchdog_s = int(usec) / 2_000_000 if wanted else 0.0

    def send(self, **fields: str) -> None:
        """Send assignments as one datagram, after earlier assignments that are still unsent."""
        text = "\n".join(f"{name}={value[:_MOST_CHARACTERS]}" for name, value in fields.items())
        for outbox in self._outboxes:
            outbox.send(text)

    def reloading(self) -> None:
        """Send RELOADING=1 with the time; without a time `systemctl reload` waits for ever."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.send(RELOADING="1", MONOTONIC_USEC=str(usec), STATUS="reloading")
