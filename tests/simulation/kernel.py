"""A kernel to run the protector in: descriptors, sockets, processes and a clock, all simulated.

Only what the protector's modules ask of the kernel is here, with the semantics that matter:
a socket pair's queue and room, shutdown and end of file, one open file behind many
descriptors, level-triggered epoll, a process that stays until it is reaped.  Every system
call is a place where the world may interfere: by a fault, by something that happens
meanwhile, or by killing the protector.

Source: unix(7), epoll(7), pidfd_open(2), waitid(2), net/unix/af_unix.c.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import os
import random
import resource
import select
import signal
import socket
import stat
import struct
import termios
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

from socketprotector.system import socket_file
from socketprotector.system.reuseport import NO_MARKS
from tests.simulation.files import Connection, File, Question, failure
from tests.simulation.ports import (
    BIND_TO_DEVICE,
    HUP,
    IN,
    OUT,
    SHUT,
    STEER,
    Address,
    Listening,
    Names,
)

#: Charged to the sender for a message with one descriptor; see system/channel.py.
CHARGE = 768
#: What a message to workers is as long as; on its way to the fd store a connection is a copy.
HEADER = 16
_SIGNALS = signal.valid_signals()
_SLOT = 64 * 1024 * 1024
_FD = struct.Struct("i")
_CREDENTIALS = struct.Struct("3i")


class Killed(BaseException):
    """The protector was killed, in whatever it did."""


class End(File):
    """One end of a socket pair that keeps messages apart."""

    def __init__(self) -> None:
        super().__init__()
        self.peer: End = self
        self.queue: deque[tuple[bytes, tuple[File, ...]]] = deque()
        self.room = 278  # messages that may wait at the peer
        self.no_receive = False
        self.no_send = False
        self.is_closed = False
        self.sent: dict[str, int] = {}  # the place of the last one that was sent on, by address
        self.taken = 0

    def ready(self) -> int:
        events = IN if self.queue or self.no_receive else 0
        if self.no_receive:
            events |= SHUT
            if self.no_send:
                events |= HUP
        if len(self.peer.queue) * 4 <= self.room:
            events |= OUT
        return events

    def send(self, data: bytes, files: tuple[File, ...]) -> None:
        peer = self.peer
        if self.no_send or peer.no_receive or peer.is_closed:
            raise failure(errno.EPIPE)
        if len(peer.queue) >= self.room:
            raise failure(errno.EAGAIN)
        for each in files:
            each.references += 1
            if isinstance(each, Connection) and len(data) == HEADER:
                each.in_queues += 1
        peer.queue.append((data, files))

    def receive(self) -> tuple[bytes, tuple[File, ...]] | None:
        """The oldest message, whose references become the caller's; None at end of file."""
        if self.queue:
            message = self.queue.popleft()
            for each in message[1]:
                if isinstance(each, Connection) and len(message[0]) == HEADER:
                    each.in_queues -= 1
                    self.taken += 1
                    each.source, each.place, each.kept_back = self, self.taken, False
            return message
        if self.no_receive:
            return None
        raise failure(errno.EAGAIN)

    def shutdown(self, how: int) -> None:
        if how != socket.SHUT_WR:
            self.no_receive = self.peer.no_send = True
        if how != socket.SHUT_RD:
            self.no_send = self.peer.no_receive = True

    def closed(self) -> None:
        self.is_closed = True
        self.shutdown(socket.SHUT_RDWR)
        while self.queue:
            data, files = self.queue.popleft()
            for each in files:
                if isinstance(each, Connection) and len(data) == HEADER:
                    each.in_queues -= 1
                each.drop()


def inode_of(file: Listening) -> int:
    """The inode of a listening socket, as it is here."""
    return file.inode if file.question is None else file.question.number


def pair() -> tuple[End, End]:
    one, other = End(), End()
    one.peer, other.peer = other, one
    return one, other


class Datagrams(File):
    """A datagram socket at an abstract address."""

    ROOM = 10  # net.unix.max_dgram_qlen

    def __init__(self, bound: dict[str, Datagrams]) -> None:
        super().__init__()
        self.queue: deque[tuple[bytes, int, tuple[File, ...]]] = deque()
        self._bound = bound
        self.address = ""

    def bind(self, address: str) -> None:
        if address in self._bound:
            raise failure(errno.EADDRINUSE)
        self.address = address
        self._bound[address] = self

    def ready(self) -> int:
        return IN if self.queue else 0

    def closed(self) -> None:
        self._bound.pop(self.address, None)
        while self.queue:
            for each in self.queue.popleft()[2]:
                each.drop()


class Running(File):
    """A pidfd."""

    def __init__(self, process: Any) -> None:
        super().__init__()
        self.process = process

    def ready(self) -> int:
        return IN if self.process.ended else 0


class Memory(File):
    """A memfd, sparse as ours are."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: dict[int, bytes] = {}
        self.size = 0  # where ftruncate has set one

    def write(self, data: bytes, at: int) -> int:
        slot, begin = divmod(at, _SLOT)
        before = self.slots.get(slot, b"")
        self.slots[slot] = before[:begin].ljust(begin, b"\0") + data + before[begin + len(data) :]
        return len(data)

    def read(self, size: int, at: int) -> bytes:
        slot, begin = divmod(at, _SLOT)
        found = self.slots.get(slot, b"")[begin : begin + size]
        return found.ljust(min(size, max(0, self.size - at)), b"\0")

    def data_from(self, at: int) -> int:
        """Return where the next slot that was written begins; `at` must be a slot's beginning."""
        slot = min((each for each in self.slots if each * _SLOT >= at), default=None)
        if slot is None:
            raise OSError(errno.ENXIO, "no data")
        return slot * _SLOT


class Pipe(File):
    """Both ends of the pipe that signals come through."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = bytearray()

    def ready(self) -> int:
        return IN if self.bytes else 0


class Watching(File):
    """An epoll descriptor."""

    def __init__(self) -> None:
        super().__init__()
        self.interest: dict[int, tuple[File, int]] = {}

    def told(self) -> list[tuple[int, int]]:
        return [
            (fd, found)
            for fd, (file, events) in self.interest.items()
            if (found := file.ready() & events)
        ]


#: What each call may fail with when the world says so: retry, out of resources, and others.
FAULTS: dict[str, tuple[int, ...]] = {
    "accept": (
        *(errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN),
        *(errno.ECONNABORTED, errno.EPERM, errno.EPROTO),
    ),
    "sendmsg": (errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS, errno.EAGAIN),
    "recvmsg": (errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN),
    "hear": (errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN),
    "line": (errno.ENOBUFS, errno.EAGAIN, errno.ETOOMANYREFS),
    "socketpair": (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM),
    "socket": (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM),
    "setsockopt": (errno.ENOMEM, errno.ENOBUFS),
    "attach": (errno.ENOMEM, errno.EPERM),
    "listen": (errno.ENOMEM, errno.EADDRINUSE),
    "connect": (errno.ENOMEM, errno.EADDRNOTAVAIL),
    "sock_diag": (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS),
    "lock": (errno.EMFILE, errno.EBUSY),
    "give": (errno.EMFILE, errno.ENFILE),
    "bind": (errno.ENOMEM, errno.EADDRINUSE),
    "bind_file": (errno.ENOMEM, errno.ENOSPC, errno.EACCES, errno.EADDRINUSE),
    "link": (errno.ENOMEM, errno.ENOSPC, errno.EACCES, errno.EEXIST),
    "rename": (errno.ENOMEM, errno.ENOSPC, errno.EACCES),
    "pidfd_open": (errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    "posix_spawn": (errno.ENOENT, errno.EACCES, errno.EAGAIN, errno.ENOMEM, errno.E2BIG),
    "fork": (errno.EAGAIN, errno.ENOMEM),
    "resolve": (errno.ENOENT, errno.EACCES, errno.EIO),
    "dup": (errno.EMFILE,),
    "fcntl": (errno.EMFILE,),
    "open": (errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    "epoll_ctl": (errno.ENOSPC, errno.ENOMEM),
    "pwrite": (errno.ENOSPC, errno.ENOMEM, errno.EIO),
}


class Kernel:
    """System calls as the protector makes them, and its descriptors."""

    def __init__(self) -> None:
        self.clock_ns = 1_000_000_000
        self.files: dict[int, File] = {}
        self._free: list[int] = []
        self._next = 3
        self.room = 100_000  # descriptors that there may ever be: RLIMIT_NOFILE
        self.limit = self.room  # now
        self.bound: dict[str, Datagrams] = {}
        self.addresses: dict[Any, Address] = {}  # by what a socket is bound to
        self.names = Names()  # of UNIX sockets
        self._numbers = count(1)  # in the names of those beside a path
        self.moved: Callable[[], None] = lambda: None  # a name leads elsewhere, or nowhere
        self.binds_to_devices = True  # any process may (Linux 5.7)
        self.somaxconn = socket.SOMAXCONN  # whatever listen() asks for
        self.group_signals = True  # a pidfd leads to its group (Linux 6.9)
        self.signals = 0  # sent to workers
        self.changes = 0  # how often a call of the protector has changed anything
        self.calls = 0
        self.quiet_calls = 1 << 62  # until the world interferes
        self.questions = 0  # that were asked
        self.sources: dict[bytes, str] = {}  # of each the address that it comes from
        self.unwritable = 0  # why a folder cannot be written to now
        self.not_removed = False  # a file was to be removed then
        self.dead = False
        self.epoll: Watching | None = None
        self.wake: Pipe | None = None
        self.note: Callable[[str], None] | None = None
        # What the world is asked; it puts its own answers here.
        self.strike: Callable[[str], int] = lambda call: 0
        self.turn: Callable[[float | None], list[tuple[int, int]]] = lambda timeout: []
        self.process_at: Callable[[int], Any] = lambda pid: None
        self.group_of: Callable[[Any], list[Any]] = lambda leader: []  # zombies, too
        self.zombie: Callable[[], Any] = lambda: None  # a child that has ended, if there is one
        self.start: Callable[[tuple[str, ...], dict[str, str], dict[int, File]], int]
        self.sent: Callable[[Connection, End], None] = lambda connection, end: None
        self.asked: Callable[[Question, Listening, str], None] = lambda question, to, source: None
        self.modules = self._modules()

    # -- every call ------------------------------------------------------------

    def enter(self, call: str) -> None:
        """Begin a system call.  Raises what the world wants it to fail with, or Killed."""
        self.calls += 1
        if self.dead:
            raise Killed
        self.quiet_calls -= 1
        if self.quiet_calls <= 0 and (code := self.strike(call)):
            if self.note:
                self.note(f"  {call} fails: {errno.errorcode[code]}")
            raise failure(code)

    def enter_folder(self, call: str) -> None:
        """Begin a system call that changes a folder.  Raises OSError."""
        self.enter(call)
        if self.unwritable:
            self.not_removed |= call == "unlink"
            raise failure(self.unwritable)

    # -- descriptors -----------------------------------------------------------

    def install(self, file: File) -> int:
        """Give a file the lowest free number.  The reference is the descriptor's."""
        if len(self.files) >= self.limit:
            raise failure(errno.EMFILE)
        if self._free:
            fd = heapq.heappop(self._free)
        else:
            fd = self._next
            self._next += 1
        file.references += 1
        self.files[fd] = file
        self.changes += 1
        return fd

    def file(self, fd: int) -> File:
        found = self.files.get(fd)
        assert found is not None, f"EBADF: descriptor {fd} is not open"
        return found

    def close(self, fd: int) -> None:
        self.enter("close")
        self.forget(fd)

    def forget(self, fd: int) -> None:
        assert fd in self.files, f"EBADF: descriptor {fd} is closed twice"
        assert self.epoll is None or fd not in self.epoll.interest, (
            f"descriptor {fd} is closed while it is watched"
        )
        heapq.heappush(self._free, fd)
        self.changes += 1
        file = self.files.pop(fd)
        file.drop()
        if isinstance(file, Listening):
            self.moved()

    def end_of_process(self) -> None:
        """Close all that the protector had."""
        left, self.files = self.files, {}
        self._free, self._next = [], 3
        self.epoll = self.wake = None
        for file in left.values():
            file.drop()

    # -- modules ---------------------------------------------------------------

    def _modules(self) -> SimpleNamespace:
        """Stand-ins for the modules through which the protector speaks with the kernel."""

        def constants(module: Any) -> dict[str, Any]:
            names = (name for name in dir(module) if name.isupper() or name.startswith("SIG"))
            return {name: getattr(module, name) for name in names}

        signals = {**constants(signal), "Signals": signal.Signals}
        return SimpleNamespace(
            os=SimpleNamespace(
                **constants(os),
                devnull=os.devnull,
                defpath=os.defpath,
                environ={"PATH": "/bin"},
                path=SimpleNamespace(
                    realpath=lambda path, strict=False: path,
                    exists=lambda _: 1,
                    dirname=os.path.dirname,
                    isfile=lambda _: False,
                    join=os.path.join,
                    split=os.path.split,
                    lexists=self._lexists,
                ),
                strerror=os.strerror,
                getuid=lambda: 1000,
                getpid=lambda: 1,
                getppid=lambda: 0,
                sysconf=os.sysconf,
                getpgid=self._getpgid,
                readlink=lambda path: "1",  # /proc/self
                sched_getscheduler=lambda _: os.SCHED_OTHER,
                close=self.close,
                dup=self._dup,
                open=self._open,
                listdir=lambda path: [],  # /proc is closed
                scandir=self._scandir,
                read=self._read,
                pipe2=self._pipe2,
                pread=lambda fd, size, at: self._memory(fd).read(size, at),
                lseek=lambda fd, at, _: self._memory(fd, "lseek").data_from(at),
                pwrite=self._pwrite,
                fstat=self._fstat,
                stat=self._stat,
                lstat=self._lstat,
                unlink=self._unlink,
                rename=self._rename,
                link=self._link,
                getxattr=self._getxattr,
                fsencode=os.fsencode,
                fsdecode=os.fsdecode,
                geteuid=lambda: 1000,
                getegid=lambda: 1000,
                urandom=random.Random(0).randbytes,
                get_blocking=lambda fd: not self._listening(fd).nonblocking,
                set_blocking=lambda fd, flag: None,
                memfd_create=self._memfd_create,
                ftruncate=self._ftruncate,
                umask=lambda mask: 0o022,
                chdir=lambda path: None,
                pidfd_open=self._pidfd_open,
                posix_spawn=self._posix_spawn,
                kill=self._kill,
                killpg=self._killpg,
                waitid=self._waitid,
                wait4=self._wait4,
                waitpid=self._waitpid,
            ),
            time=SimpleNamespace(
                time=self._monotonic,
                monotonic=self._monotonic,
                CLOCK_BOOTTIME=time.CLOCK_BOOTTIME,
                clock_gettime=lambda _: self._monotonic(),
                sleep=lambda _: None,  # too short for anything else to happen
                monotonic_ns=self._monotonic_ns,
                clock_gettime_ns=lambda _: self._monotonic_ns(),
                CLOCK_MONOTONIC=1,
            ),
            socket=SimpleNamespace(
                **constants(socket),
                socket=self._socket,
                socketpair=self._socketpair,
            ),
            select=SimpleNamespace(
                **constants(select), epoll=lambda: Epoll(self), poll=lambda: Poll(self)
            ),
            fcntl=SimpleNamespace(**constants(fcntl), ioctl=self._ioctl, fcntl=self._fcntl),
            resource=SimpleNamespace(
                **constants(resource),
                getrlimit=lambda _: (min(1024, self.room), min(4096, self.room)),
                setrlimit=lambda *_: None,
                getrusage=lambda _: SimpleNamespace(ru_maxrss=0),
            ),
            signal=SimpleNamespace(
                **signals,
                signal=lambda *_: None,
                setitimer=lambda *_: (0.0, 0.0),
                pthread_sigmask=lambda *_: (),
                set_wakeup_fd=lambda *_, **__: None,
                valid_signals=lambda: _SIGNALS,
                pidfd_send_signal=self._pidfd_send_signal,
            ),
        )

    def _monotonic(self) -> float:
        return self.clock_ns / 1e9

    def _monotonic_ns(self) -> int:
        self.clock_ns += 1000
        return self.clock_ns

    def _memory(self, fd: int, call: str = "pread") -> Memory:
        self.enter(call)
        file = self.file(fd)
        assert isinstance(file, Memory)
        return file

    def address_at(self, name: Any) -> Address:
        """Return what is at an address that is bound; port 0 is one of its own."""
        if name in self.addresses:
            return self.addresses[name]
        if isinstance(name, str):  # beside a path, or to be renamed
            path = socket_file.path_of(name)
            return self.addresses.get(path) or Address(socket.AF_UNIX, name, self.names)
        name = name[0], 50_000 + len(self.addresses)
        return self.addresses.setdefault(name, Address(socket.AF_INET, name))

    def _listening(self, fd: int) -> Listening:
        file = self.file(fd)
        assert isinstance(file, Listening)
        return file

    def _fstat(self, fd: int) -> Any:
        self.enter("fstat")
        file = self.file(fd)
        size = len(file.slots) if isinstance(file, Memory) else 0
        inode = inode_of(file) if isinstance(file, Listening) else 0
        return SimpleNamespace(st_size=size, st_mode=stat.S_IFREG, st_ino=inode)

    def _lstat(self, path: str) -> Any:
        self.enter("lstat")
        if path == "/srv":
            return SimpleNamespace(st_dev=1, st_ino=1, st_mode=0o40755, st_uid=1000, st_gid=1000)
        node = self.names.get(path)
        if node is None:
            raise failure(errno.ENOENT, path)
        mode = stat.S_IFSOCK | 0o600
        return SimpleNamespace(
            st_dev=1, st_ino=node.inode, st_mode=mode, st_uid=1000, st_gid=1000, st_nlink=1
        )

    def _stat(self, path: str) -> Any:
        if path.startswith("/srv/"):
            return self._lstat(path)
        return SimpleNamespace(st_ctime=0.0)  # of a program, never changed

    def _lexists(self, path: str) -> bool:
        self.enter("lstat")
        return path in self.names

    def _scandir(self, path: str) -> Any:
        self.enter("open")
        names = [
            SimpleNamespace(path=each)
            for each in self.names
            if isinstance(each, str) and each.startswith(f"{path}/")
        ]
        return nullcontext(names)

    def _getxattr(self, path: str, name: str, *, follow_symlinks: bool) -> bytes:
        raise failure(errno.ENODATA, path)

    def _link(self, old: str, new: str, *, follow_symlinks: bool) -> None:
        self.enter_folder("link")
        if old not in self.names:
            raise failure(errno.ENOENT, old)
        if new in self.names:
            raise failure(errno.EEXIST, new)
        self.names[new] = self.names[old]
        self._is_at(new)

    def _rename(self, old: str, new: str) -> None:
        self.enter_folder("rename")
        if old not in self.names:
            raise failure(errno.ENOENT, old)
        if self.names[old] is not self.names.get(new):  # else nothing is done
            self.names[new] = self.names.pop(old)
        self._is_at(new)

    def _is_at(self, path: str) -> None:
        """Have a socket be one of the path that leads to it now."""
        one, address = self.names[path].socket, self.addresses.get(path)
        if one is not None and address is not None and one.address is not address:
            address.listening += one.address.listening
            one.address = address
        self.changes += 1
        self.moved()

    def _unlink(self, path: str) -> None:
        self.enter_folder("unlink")
        if path not in self.names:
            raise failure(errno.ENOENT, path)
        del self.names[path]
        self.changes += 1
        self.moved()

    def bind_beside(self, address: Address) -> Listening:
        """Bind one more socket of a path, as the launching process does."""
        made = Listening(address)
        folder, _, name = address.name.rpartition("/")
        made.bind(address, f"{folder}/.{name}.sp-{next(self._numbers):06x}")
        made.listen(self.somaxconn)
        self.names[f"{made.bound_as}~"] = self.names.pop(made.bound_as)
        return made

    def remove_stale(self, path: str) -> None:
        """Remove the files of a path on which no process listens, as that does."""
        folder, _, file = path.rpartition("/")
        self.names.pop(f"{folder}/.{file}.sp-new", None)
        for name, node in list(self.names.items()):
            beside = socket_file.path_of(name.removesuffix("~")) == path
            if beside and (node.socket is None or node.socket.refuses):
                del self.names[name]

    def _pwrite(self, fd: int, data: bytes, at: int) -> int:
        self.enter("pwrite")
        file = self.file(fd)
        assert isinstance(file, Memory)
        return file.write(data, at)

    def _ftruncate(self, fd: int, size: int) -> None:
        self.enter("ftruncate")
        file = self.file(fd)
        assert isinstance(file, Memory)
        file.size = size

    def _fcntl(self, fd: int, command: int, value: Any) -> Any:
        if command in (15, 16):  # F_SETOWN_EX, F_GETOWN_EX: of a kernel that tells no empty group
            return bytes(8)
        if command == fcntl.F_ADD_SEALS:
            self.enter("fcntl")
            return 0
        return self._dup(fd, "fcntl")

    def _memfd_create(self, name: str, flags: int) -> int:
        self.enter("memfd_create")
        return self.install(Memory())

    def _dup(self, fd: int, call: str = "dup") -> int:
        self.enter(call)
        return self.install(self.file(fd) if fd > 2 else File())

    def _open(self, path: str, flags: int) -> int:
        self.enter("open")
        return self.install(File())

    def _pipe2(self, flags: int) -> tuple[int, int]:
        self.enter("pipe2")
        if self.wake is not None:  # not the loop's: a worker gets the other end of it
            return self._pair()
        self.wake = Pipe()
        return self.install(self.wake), self.install(self.wake)

    def _pair(self) -> tuple[int, int]:
        if len(self.files) + 2 > self.limit:
            raise failure(errno.EMFILE)
        one, other = pair()
        return self.install(one), self.install(other)

    def _read(self, fd: int, size: int) -> bytes:
        self.enter("read")
        file = self.file(fd)
        if isinstance(file, End):
            message = file.receive()
            self.changes += 1
            return message[0] if message is not None else b""
        assert isinstance(file, Pipe)
        if not file.bytes:
            raise failure(errno.EAGAIN)
        found = bytes(file.bytes)
        file.bytes.clear()
        self.changes += 1
        return found

    def _ioctl(self, which: Socket, request: int, into: bytearray) -> None:
        assert request == termios.FIONREAD
        self.enter("ioctl")
        file = self.file(which.fileno())
        assert isinstance(file, End)
        into[:] = sum(len(data) for data, _ in file.queue).to_bytes(4, "little")

    # -- what the protector's modules do by several calls ------------------------

    def listening(self, family: int, port: int, like: Collection[int] = ()) -> dict[int, int]:
        """In the place of sock_diag.listening()."""
        self.enter("sock_diag")
        return self.addresses["h", port].order()

    def unread(
        self, family: int, ports: Collection[int], *, in_handshake: bool = False
    ) -> dict[int, dict[bytes, bool]]:
        """In the place of sock_diag.unread()."""
        self.enter("sock_diag")
        return {port: self.addresses["h", port].unread(in_handshake) for port in ports}

    def still_unread(
        self, family: int, clients: Collection[bytes], *, in_handshake: bool = False
    ) -> dict[bytes, bool]:
        """In the place of sock_diag.still_unread()."""
        self.enter("sock_diag")
        found: dict[bytes, bool] = {}
        for address in self.addresses.values():
            found.update(address.unread(in_handshake))
        return {client: found[client] for client in clients if client in found}

    def unaccepted(self, which: Socket) -> frozenset[bytes] | tuple[int, ...]:
        """In the place of sock_diag.unaccepted()."""
        self.enter("sock_diag")
        file = self._listening(which.fileno())
        if not file.address.by_number:
            return tuple(each.number for each in file.backlog)
        waiting = [each for one in file.address.listening for each in one.backlog]
        return frozenset(b"%d" % each.number for each in waiting)

    def queue_of_unix(self, which: Socket) -> tuple[int, int]:
        """In the place of sock_diag.queue_of_unix()."""
        self.enter("sock_diag")
        listening = self._listening(which.fileno())
        return len(listening.backlog), listening.room

    def is_waiting(self, which: Socket, *_: Any) -> bool:
        """In the place of sock_diag.is_waiting()."""
        self.enter("sock_diag")
        question = self._listening(which.fileno()).question
        return question is not None and not (question.taken or question.over)

    def end_of(self, which: Socket, family: int) -> bytes:
        """In the place of sock_diag.end_of()."""
        question = self._listening(which.fileno()).question
        return b"" if question is None else b"%d" % question.number

    def comes_from(self, end: bytes | int, sources: Collection[str]) -> bool:
        """In the place of bpf.comes_from()."""
        return isinstance(end, bytes) and self.sources.get(end) in sources

    @contextmanager
    def locked(self, path: str, patience_s: float = 0.0) -> Iterator[None]:
        """In the place of folder.locked()."""
        self.enter_folder("lock")
        yield

    def file_of(self, which: Socket) -> int:
        """In the place of sock_diag.file_of()."""
        self.enter("sock_diag")
        node = self._listening(which.fileno()).node
        return node.inode if node is not None else 0

    def file_key(self, which: Socket) -> int:
        """In the place of sock_diag.file_key()."""
        self.enter("sock_diag")
        return self._listening(which.fileno()).key

    def give(self, path: str, *_: Any) -> Any:
        """In the place of folder.give()."""
        self.enter("give")
        return self._lstat(path)

    def fork(
        self,
        program: Any,
        environment: dict[str, str],
        places: dict[int, int],
        tell_pid: str,
        lifeline: int,
    ) -> int:
        """In the place of spawn._fork(): the child, until it has become the worker."""
        assert lifeline < 0, "there are no checks here"
        self.enter("posix_spawn")
        self.changes += 1
        given = {theirs: self.file(ours) for theirs, ours in places.items()}
        return self.start(program.argv, environment, given)

    def steer(
        self,
        one: Socket,
        member: int,
        marked: Mapping[Any, int] = NO_MARKS,
        drawn: int = 0,
        share: int = 0,
    ) -> None:
        """In the place of reuseport.steer()."""
        marks = {mark.source: its for mark, its in marked.items()}
        one.attach(STEER, member, marks, drawn, share)

    def connect(self, one: Listening, target: Any) -> int:
        """Have a question come to an address, from what `one` is bound to; return as connect_ex."""
        source = one.address.name[0] if one.address.name is not None else ""
        if isinstance(target, str):
            to = self.names.at(target)
        else:
            address = self.addresses.get(target)
            to = address.for_new(self.questions, source) if address is not None else None
        if to is None:
            return errno.ECONNREFUSED
        if to.drops or to.full:
            return errno.EINPROGRESS if to.address.by_number else errno.EAGAIN
        self.questions += 1
        question = one.question = Question(-self.questions, to.address, to.tag)
        question.take()
        self.sources[b"%d" % question.number] = source
        if self.note:
            self.note(f"{question} comes to {to.name}, socket {to.inode}")
        self.asked(question, to, source)
        if to.address.by_number and to.mask:  # it finds itself shut down
            question.drop()
        else:
            to.backlog.append(question)
        self.changes += 1
        return errno.EINPROGRESS if to.address.by_number else 0

    # -- processes -------------------------------------------------------------

    def _pidfd_open(self, pid: int) -> int:
        self.enter("pidfd_open")
        return self.install(Running(self.process_at(pid)))

    def _posix_spawn(
        self,
        path: str,
        argv: tuple[str, ...],
        environment: dict[str, str],
        *,
        file_actions: Iterable[tuple[Any, ...]],
        **_: Any,
    ) -> int:
        self.enter("posix_spawn")
        given = {
            action[2]: self.file(action[1])
            for action in file_actions
            if action[0] == os.POSIX_SPAWN_DUP2
        }
        self.changes += 1
        return self.start(argv, environment, given)

    def _kill(self, pid: int, number: int) -> None:
        self.enter("kill")
        self._signal([self._at(pid)], number)

    def _killpg(self, pid: int, number: int) -> None:
        self.enter("kill")
        self._signal(self.group_of(self._at(pid)), number)

    def _at(self, pid: int) -> Any:
        try:
            return self.process_at(pid)
        except KeyError:  # never there
            raise failure(errno.ESRCH) from None

    def _getpgid(self, pid: int) -> int:
        self.enter("getpgid")
        process = self._at(pid)
        if process.gone:
            raise failure(errno.ESRCH)
        return int(process.leader.pid)

    def _signal(self, processes: list[Any], number: int) -> None:
        """Signal those that are there; one that waits to be reaped takes no notice."""
        there = [each for each in processes if not each.gone]
        if not there:
            raise failure(errno.ESRCH)
        for each in there:
            if number and not each.ended:
                each.signal(number)
                self.signals += 1
                self.changes += 1

    def _pidfd_send_signal(self, fd: int, number: int, _: None = None, flags: int = 0) -> None:
        if flags and not self.group_signals:
            raise failure(errno.EINVAL)
        self.enter("kill")
        file = self.file(fd)
        assert isinstance(file, Running)
        self._signal(self.group_of(file.process) if flags else [file.process], number)

    def _waitid(self, kind: int, fd: int, flags: int) -> Any:
        if kind == os.P_ALL:
            found = self.zombie()
            return None if found is None else SimpleNamespace(si_pid=found.pid)
        self.enter("waitid")
        file = self.file(fd)
        assert isinstance(file, Running)
        if file.process.reaped or file.process.orphan:
            raise failure(errno.ECHILD)
        if not file.process.ended:
            return None
        assert flags & os.WNOWAIT
        return True

    def _wait4(self, pid: int, flags: int) -> tuple[int, int, Any]:
        process = self.process_at(pid)
        assert process.ended, "a wait that would block"
        assert not process.reaped
        process.reaped = process.gone = True
        self.changes += 1
        code, status = process.result
        said = status << 8 if code == os.CLD_EXITED else int(status)
        return pid, said, SimpleNamespace(ru_utime=0.0, ru_stime=0.0, ru_maxrss=0)

    def _waitpid(self, pid: int, flags: int) -> None:
        self.enter("waitid")
        process = self.process_at(pid)
        assert process.ended, "a wait that would block"
        known = any(isinstance(f, Running) and f.process is process for f in self.files.values())
        assert flags or not known, f"worker {pid} is reaped as a stranger"
        process.reaped = process.gone = True

    # -- sockets ---------------------------------------------------------------

    def _socket(self, family: int = 0, kind: int = 0, fileno: int | None = None) -> Socket:
        if fileno is not None:
            return Socket(self, fileno)
        self.enter("socket")
        file: File = pair()[0]
        if kind & socket.SOCK_DGRAM:
            file = Datagrams(self.bound)
        elif kind & ~socket.SOCK_NONBLOCK == socket.SOCK_STREAM:
            file = Listening(Address(family, None))
        return Socket(self, self.install(file))

    def _socketpair(
        self, family: int = socket.AF_UNIX, kind: int = socket.SOCK_STREAM
    ) -> tuple[Socket, Socket]:
        self.enter("socketpair")
        one, other = self._pair()
        return Socket(self, one), Socket(self, other)


class Socket:
    """What socket.socket is to the protector."""

    def __init__(self, kernel: Kernel, fd: int) -> None:
        self._kernel = kernel
        self._fd = fd
        self._file = kernel.file(fd)

    @property
    def family(self) -> int:
        return self._file.family if isinstance(self._file, Listening) else socket.AF_UNIX

    @property
    def type(self) -> int:
        if isinstance(self._file, Listening):
            return socket.SOCK_STREAM
        return socket.SOCK_DGRAM if isinstance(self._file, Datagrams) else socket.SOCK_SEQPACKET

    def fileno(self) -> int:
        return self._fd

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def setblocking(self, flag: bool) -> None:
        if isinstance(self._file, Listening):
            self._file.set_flags(not flag)
        else:
            assert not flag, "a call here would wait"

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._kernel.close(fd)

    def detach(self) -> int:
        fd, self._fd = self._fd, -1
        return fd

    def shutdown(self, how: int) -> None:
        self._kernel.enter("shutdown")
        if not isinstance(self._file, Datagrams):  # it is about to be closed
            assert isinstance(self._file, Listening | End)
            self._file.shutdown(how)
        self._kernel.changes += 1

    def bind(self, address: Any) -> None:
        is_path = isinstance(address, str) and address.startswith("/")
        if is_path:
            self._kernel.enter_folder("bind_file")
        else:
            self._kernel.enter("bind")
        if isinstance(self._file, Listening):
            self._file.bind(self._kernel.address_at(address), address if is_path else "")
        else:
            assert isinstance(self._file, Datagrams)
            self._file.bind("@" + address[1:])
        self._kernel.changes += 1

    def listen(self, room: int) -> None:
        self._kernel.enter("listen")
        assert isinstance(self._file, Listening)
        self._file.listen(min(room, self._kernel.somaxconn))
        self._kernel.changes += 1

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        self._kernel.enter("option" if isinstance(self._file, Listening) else "setsockopt")
        if isinstance(self._file, Listening):
            if option == BIND_TO_DEVICE and not self._kernel.binds_to_devices:
                raise failure(errno.EPERM)
            self._file.set(level, option, value)
            self._kernel.changes += 1
        elif isinstance(self._file, End) and option != socket.SO_PASSCRED:
            self._file.room = max(6, -(-2 * value // CHARGE))

    def connect_ex(self, target: Any) -> int:
        assert isinstance(self._file, Listening)
        try:
            self._kernel.enter("connect")
        except OSError as error:
            return error.errno or 0
        return self._kernel.connect(self._file, target)

    def attach(
        self,
        option: int,
        place: int,
        marked: dict[str, int] | None = None,
        drawn: int = 0,
        share: int = 0,
    ) -> None:
        """As setsockopt() does it with a program.

        place: what that answers; marked: to what comes from these addresses, something else;
        drawn: to a share of the others.
        """
        self._kernel.enter("attach")
        assert isinstance(self._file, Listening)
        self._file.attach(option, place, marked or {}, drawn, share)
        self._kernel.changes += 1

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        if self._fd < 0:  # a probe may have one that was replaced meanwhile
            raise failure(errno.EBADF)
        if isinstance(self._file, Listening):
            if (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO):
                return struct.pack("=24x2I", len(self._file.backlog), self._file.room)
            return b"" if size else self._file.get(level, option)
        assert isinstance(self._file, End)
        return self._file.room * CHARGE

    def getsockname(self) -> Any:
        assert isinstance(self._file, Listening)
        return self._file.name

    def _accept(self) -> tuple[int, None]:
        kernel, listening = self._kernel, self._file
        kernel.enter("accept")
        assert isinstance(listening, Listening)
        assert self._fd >= 0
        if listening.address.by_number and not listening.listens:
            raise failure(errno.EINVAL)
        if not listening.backlog:
            raise failure(errno.EAGAIN)
        fd = kernel.install(listening.backlog[0])
        connection = listening.backlog.popleft()
        connection.references -= 1  # the backlog's
        listening.accepted += 1
        if isinstance(connection, Connection):
            connection.source, connection.place = listening, listening.accepted
        return fd, None

    def accept(self) -> tuple[Socket, None]:
        return Socket(self._kernel, self._accept()[0]), None

    def sendmsg(
        self, data: list[bytes], rights: list[Any], flags: int, address: str | None = None
    ) -> None:
        kernel, end = self._kernel, self._file
        if self._fd < 0:
            raise failure(errno.EBADF)
        files = tuple(kernel.file(_FD.unpack(each[2])[0]) for each in rights)
        carries = bool(files) and isinstance(files[0], Connection)
        assert isinstance(end, End)
        try:
            kernel.enter("sendmsg" if carries and len(data[0]) == HEADER else "line")
            end.send(data[0], files)
        except OSError:
            if carries and len(data[0]) == HEADER:
                connection = cast("Connection", files[0])
                connection.kept_back |= connection.source is end.peer
            raise
        kernel.changes += 1
        if carries and len(data[0]) == HEADER:
            kernel.sent(files[0], end)  # type: ignore[arg-type]

    def recvmsg(self, size: int, ancillary: int, flags: int) -> tuple[bytes, list[Any], int, None]:
        kernel = self._kernel
        if isinstance(self._file, Datagrams):
            kernel.enter("hear")
            if not self._file.queue:
                raise failure(errno.EAGAIN)
            data, pid, files = self._file.queue[0]
            if flags & socket.MSG_PEEK:
                files = ()
            else:
                self._file.queue.popleft()
            rights = [(1, socket.SCM_CREDENTIALS, _CREDENTIALS.pack(pid, 1000, 1000))]
        else:
            assert isinstance(self._file, End)
            kernel.enter("recvmsg")
            if flags & socket.MSG_PEEK and self._file.queue:  # without room for descriptors
                return self._file.queue[0][0][:size], [], 0, None
            message = self._file.receive()
            if message is None:
                return b"", [], 0, None
            (data, files), rights = message, []
        fds = []
        for file in files:
            try:
                if ancillary:
                    fds.append(kernel.install(file))
            except OSError:
                pass  # the kernel drops what finds no number, and says MSG_CTRUNC
            file.drop()
        kernel.changes += 1
        if fds:
            content = b"".join(map(_FD.pack, fds))
            rights.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, content))
        return data[:size], rights, 0 if ancillary else socket.MSG_CTRUNC, None

    def recv(self, size: int, flags: int) -> bytes:
        if isinstance(self._file, Datagrams):
            return self.recvmsg(size, 0, flags)[0]
        assert isinstance(self._file, End)
        message = self._file.receive()
        self._kernel.changes += 1
        return message[0] if message else b""


class Epoll:
    """What select.epoll is to the protector's loop."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._file = kernel.epoll = Watching()
        self._fd = kernel.install(self._file)

    def register(self, fd: int, events: int) -> None:
        self._kernel.enter("epoll_ctl")
        assert fd not in self._file.interest, f"EEXIST: descriptor {fd} is watched already"
        self._file.interest[fd] = self._kernel.file(fd), events | HUP
        self._kernel.changes += 1

    def unregister(self, fd: int) -> None:
        self._kernel.enter("unwatch")
        assert fd in self._file.interest, f"ENOENT: descriptor {fd} is not watched"
        del self._file.interest[fd]
        self._kernel.changes += 1

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        return self._kernel.turn(timeout)

    def close(self) -> None:
        self._kernel.epoll = None
        self._kernel.close(self._fd)


class Poll:
    """What select.poll is to the protector."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._asked: list[tuple[int, int]] = []

    def register(self, what: Any, events: int) -> None:
        self._asked.append((what if isinstance(what, int) else what.fileno(), events))

    def poll(self, timeout_ms: float = 0) -> list[tuple[int, int]]:
        kernel = self._kernel
        kernel.enter("poll")
        told = [(fd, kernel.file(fd).ready() & (events | HUP)) for fd, events in self._asked]
        found = [each for each in told if each[1]]
        if not found and timeout_ms:
            kernel.clock_ns += int(timeout_ms * 1e6)
        return found
