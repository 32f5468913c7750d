"""The sd_notify protocol, both ways: from workers to us, and from us to systemd.

Systemd's variables, and where each is read: LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES in
launch/activation.py (the resident process: inherited.py); NOTIFY_SOCKET in daemon/parents.py;
WATCHDOG_USEC, WATCHDOG_PID and FDSTORE here; INVOCATION_ID in daemon/parents.py; JOURNAL_STREAM in
log.py; RUNTIME_DIRECTORY in launch/preflight.py.  Variables of workers: daemon/worker_spawn.py.

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

from .cleanup import on_error
from .foreign_descriptors import drop_unread, dropping
from .inherited import Named
from .peer_credentials import unmistakable_users

#: The name in its folder under which each socket is bound.
_BOUND_NAME = "new"
#: Longer datagrams are cut; systemd itself takes a page.
_MAX_BYTES = 4096
#: The manager is slow, or resources are short; any other error means that it is gone.
_LATER = frozenset(
    {errno.EAGAIN, errno.EINTR, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE}
)
#: Without FDPOLL=0 systemd drops what hangs up, as a channel that drains does.
_STORE = "FDSTORE=1\nFDNAME={}\nFDPOLL=0"
#: The timer that has the watchdog fed.
WATCHDOG = "watchdog"
#: The standard ones, sockets of .socket units, and what the next program opens before it raises
#: its limit.
_NOT_STORED = 64
#: Of a 64-bit number, the longest that systemd says.
_USEC_DIGITS = 20
_DESCRIPTOR = struct.Struct("i")
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_CREDENTIALS = struct.Struct("3i")
_SENDER_BYTES = socket.CMSG_SPACE(_CREDENTIALS.size)


class NotifySocket:
    """The socket on which one worker sends to us.  Its address identifies the worker."""

    def __init__(self, bound: socket.socket, address: str, allowed_uids: frozenset[int]) -> None:
        """Take ownership of a socket that make() bound to the address."""
        self.socket = bound
        self.address = address
        self._is_abstract = address.startswith("@")
        # Any process can send to an abstract name: there a number must stand for one user.  To the
        # path only those can that were given its name.
        self._allowed = unmistakable_users(allowed_uids) if self._is_abstract else allowed_uids

    @classmethod
    def make(cls, address: str, allowed_uids: frozenset[int]) -> NotifySocket:
        """Bind a path in our own folder, or an abstract address (`@name`).  Raises OSError.

        No other process can guess either.
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

    def hear(self, pid: int) -> Mapping[str, str] | None:
        """Return the assignments of the next message, None without a message.  Raises OSError.

        The message stays until take(): if this program is killed before it records the message,
        the next program reads it.

        A message counts if the worker (pid) or an allowed user sent it: its sender may have ended,
        or the worker may have changed its user.  A stranger's message assigns nothing.
        """
        try:
            # No room for descriptors: none is made.
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

    def take(self) -> None:
        """Remove the message that was heard; the kernel drops the descriptors that came with it.

        For the one of a BARRIER that is the sign that all is handled.  Raises OSError.
        """
        with dropping():
            self.socket.recv(1, socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Close it, and remove its file."""
        drop_unread(self.socket)
        self.socket.close()
        if not self._is_abstract:
            _remove(self.address)


def _bound_as(address: str) -> str:
    """Return what the kernel calls an address: an abstract one begins with a NUL."""
    return "\0" + address[1:] if address.startswith("@") else address


def _bind_path(bound: socket.socket, path: str) -> None:
    """Bind a path that /proc/net/unix does not reveal: it shows the name bound first.

    The folder's permissions decide who may send.
    """
    temporary = os.path.join(os.path.dirname(path), _BOUND_NAME)
    _remove(temporary)
    bound.bind(temporary)
    with on_error(_remove, temporary):
        os.chmod(temporary, 0o666)
        os.rename(temporary, path)


def _remove(path: str) -> None:
    with suppress(OSError):  # removed already
        os.unlink(path)


def remove_folder(path: str) -> None:
    """Remove the folder of notify sockets if it is empty and we may; else the next start does."""
    with suppress(OSError):
        os.rmdir(path)


def _is_number(text: str) -> bool:
    # isdigit() alone is true of digits that int() does not take.
    return text.isascii() and text.isdigit() and len(text) <= _USEC_DIGITS


def parse(data: bytes) -> dict[str, str]:
    """Return the NAME=VALUE lines of a datagram; what is no such line is passed over."""
    lines = (line.partition("=") for line in data.decode("utf-8", "replace").split("\n"))
    return {name: value for name, found, value in lines if found and name}


class Outbox:
    """Messages to a service manager, in order.  Never blocks, never raises.

    Unsent messages wait: a manager that misses READY=1 ends us after its time-out, and a
    manager that misses a descriptor cannot return it.
    """

    def __init__(
        self,
        later: Callable[[Callable[[], None]], None],
        line: socket.socket | None = None,
        address: str = "",
    ) -> None:
        """Send over a connected line, which it owns, or to an address; with neither, nowhere.

        `later` calls what it is given after a moment.
        """
        self._later = later
        # Connect each time: a restarted manager has another socket under the same name.
        self._to = (_bound_as(address),) if address else ()
        if line is None and address:
            # For life: where descriptors have run out, the watchdog wants to be fed all the same.
            line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._line = line
        #: Text -> copy of a descriptor, -1 for none.
        self._unsent: dict[bytes, int] = {}

    @property
    def open(self) -> bool:
        return self._line is not None

    @property
    def waiting(self) -> bool:
        """Whether something could not be sent yet."""
        return bool(self._unsent)

    def send(self, text: str, fd: int = -1) -> bool:
        """Send a message, with a copy of a descriptor if one is given; False if that fails."""
        if self._line is None:
            return True
        try:
            copy = os.dup(fd) if fd >= 0 else -1
        except OSError:
            return False
        # A file's name in a status need not be UTF-8.
        data = text.encode("utf-8", "backslashreplace")
        # Once is enough: the watchdog's would fill the memory, and the last word stays last.
        self._drop(data)
        self._unsent[data] = copy
        self._flush()
        return True

    def withdraw(self, text: str) -> bool:
        """Forget a message that still waits, with its descriptor; False if there is none."""
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
                # Otherwise the manager is gone, or refuses our messages.
            self._drop(data)

    def finish(self, seconds: float) -> None:
        """Send what is left, waiting for room so long; then no more."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        if self._line is not None:
            # A datagram socket is writable however full its peer is, unless it is connected to it.
            with suppress(OSError):  # no such peer: then each message fails, too
                for address in self._to:
                    self._line.connect(address)
            poll.register(self._line, select.POLLOUT)
        while self._unsent and (left := deadline - time.monotonic()) > 0:
            poll.poll(left * 1000)
            self._flush()
        self.close()

    def close(self) -> None:
        """Send no more."""
        if self._line is not None:
            self._line.close()
            self._line = None
        for data in tuple(self._unsent):
            self._drop(data)


def room_of(environment: Mapping[str, str], soft_limit: int) -> int:
    """Return how many descriptors a service manager has room for, and can pass on.

    soft_limit: of descriptors, as it has set it for us.  systemd sets it for the next program, too,
    before it puts what is stored there in place, and one number beyond it makes that start fail.

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
        """`kept`: the names under which descriptors came from there.

        most: descriptors that it has room for; names_bytes: the same for their names, each with a
        separator.
        """
        self._outbox = outbox
        #: The names under which there is something.
        self.kept = set(kept)
        self._most, self._names_bytes = most, names_bytes
        self._bytes = sum(len(name) + 1 for name in self.kept)
        self._left_out: set[str] = set()  # because it was full
        self._few: set[str] = set()  # those of `kept` and `_due` that each sync() is given
        self._due = set(kept)  # to be given, or to be forgotten

    @property
    def flushed(self) -> bool:
        """Whether all has been sent."""
        return not self._outbox.waiting

    @property
    def keeps(self) -> bool:
        """Whether there is a store at all."""
        return self._outbox.open

    @property
    def complete(self) -> bool:
        """Whether all that was wanted last has been given away."""
        return not self._due

    def has(self, wanted: Iterable[str]) -> bool:
        """Whether all of these were given away, and nothing is still to be said."""
        return not self.keeps or (self.flushed and (self.kept | self._left_out).issuperset(wanted))

    def holds(self, names: Iterable[str]) -> bool:
        """Whether all of these were given away and taken."""
        return self.keeps and self.kept.issuperset(names)

    @property
    def full(self) -> bool:
        """Whether some had to be left out: after a kill their workers are missing."""
        return bool(self._left_out)

    def sync(self, few: Mapping[str, int], many: Named | None = None) -> None:
        """Keep exactly these descriptors in the store, by name.  The caller still owns them.

        A name stands for one descriptor for ever, so only names are compared; of the many only
        those that have changed.
        """
        if not self.keeps:
            if many is not None:
                many.changed.clear()  # or the name of each worker would stay there
            return
        before, due = self._few, self._due
        due |= (before ^ few.keys()) | self._left_out  # there may be room by now
        due |= self.kept if many is None else many.changed
        many = Named() if many is None else many
        many.changed.clear()
        # First what is new: it may be in the place of what is over, and we be killed in between.
        # In this order: what all depends on comes first.
        given = [self._give(name, few[name]) for name in few]
        for name in tuple(due):
            if name not in few and name not in many and (all(given) or name not in before):
                self.forget(name)
                due.discard(name)
        for name in (*few, *due):
            fd = few.get(name, many.get(name))
            if fd is not None and self._give(name, fd):
                due.discard(name)
        self._few = before & due | few.keys()

    def _give(self, name: str, fd: int) -> bool:
        """Store a descriptor; return False if that must be tried again later."""
        if name in self.kept:
            return True
        room = self._bytes + len(name) < self._names_bytes and len(self.kept) < self._most
        if not room:
            self._left_out.add(name)
            return True  # nothing is gained by trying
        if not self._outbox.send(_STORE.format(name), fd):
            return False
        self._left_out.discard(name)
        self.kept.add(name)
        self._bytes += len(name) + 1
        return True

    def forget(self, name: str) -> None:
        """Remove a descriptor from the store."""
        self._left_out.discard(name)
        if name not in self.kept:
            return
        # What was not sent yet must not be: its copy would hold a connection open that a
        # worker has closed.
        if not self._outbox.withdraw(_STORE.format(name)):
            self._outbox.send(f"FDSTOREREMOVE=1\nFDNAME={name}")
        self.kept.discard(name)
        self._bytes -= len(name) + 1


class Systemd:
    """The service manager that started us, if one did; and the guard, which listens along."""

    def __init__(self, environment: Mapping[str, str], pid: int, *outboxes: Outbox) -> None:
        """pid: the main process of the service.  The first outbox leads to NOTIFY_SOCKET."""
        self.pid = pid
        self._outboxes = outboxes
        usec = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        wanted = ours and outboxes[0].open and _is_number(usec)
        #: Seconds between two WATCHDOG=1, half of what the manager allows; 0 without one.
        self.watchdog_s = int(usec) / 2_000_000 if wanted else 0.0

    def send(self, **fields: str) -> None:
        """Send assignments as one datagram, after earlier assignments that are still unsent."""
        text = "\n".join(f"{name}={value}" for name, value in fields.items())
        for outbox in self._outboxes:
            outbox.send(text)

    def reloading(self) -> None:
        """RELOADING=1 needs the time beside it, else `systemctl reload` waits for ever."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.send(RELOADING="1", MONOTONIC_USEC=str(usec), STATUS="reloading")
