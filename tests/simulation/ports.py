"""Listening sockets of the simulated kernel: where a new client gets to and waits.

Source: inet_shutdown() in net/ipv4/af_inet.c, tcp_disconnect() in net/ipv4/tcp.c;
__inet_hash() and inet_lhash2_lookup() in net/ipv4/inet_hashtables.c; net/core/sock_reuseport.c;
unix_shutdown() and unix_stream_connect() in net/unix/af_unix.c.
"""

from __future__ import annotations

import errno
import random
import select
import socket
from collections import deque
from itertools import count
from typing import Any, cast

from socketprotector.model.share import WHOLE
from socketprotector.system import accept_tags
from tests.simulation.files import Connection, File, Question, failure

IN, OUT, SHUT, HUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLRDHUP, select.EPOLLHUP
#: Options that Python has no names for.
ATTACH_FILTER, DETACH_FILTER, STEER, BIND_TO_DEVICE = 26, 27, 51, 62
IP_MINTTL = 21
#: What is set of those that are marks, as long as no process has changed it.
_SET: dict[int, tuple[int, ...]] = {
    socket.AF_INET: (socket.IP_MULTICAST_LOOP, accept_tags.IP_MULTICAST_ALL),
    socket.AF_INET6: (socket.IP_MULTICAST_LOOP,),
    socket.AF_UNIX: (),
}
_MASK = {socket.SHUT_RD: 1, socket.SHUT_WR: 2, socket.SHUT_RDWR: 3}
#: Where a socket comes back that was bound as port 0 and shut down.
ASTRAY = ("h", 60_000)


class Node:
    """What a name of a UNIX socket stands for: a file that may have several, or an abstract one."""

    def __init__(self, inode: int, socket: Listening) -> None:
        self.inode = inode
        self.socket: Listening | None = socket  # None: it is closed


class Names(dict[str, Node]):
    """The names that UNIX sockets have, all in one folder."""

    def __init__(self) -> None:
        super().__init__()
        self._inodes = count(1_000_000)

    def add(self, name: str, socket: Listening) -> None:
        """Bind a socket.  Raises OSError."""
        if name in self:
            raise failure(errno.EADDRINUSE)
        socket.node = self[name] = Node(next(self._inodes), socket)

    def at(self, name: str) -> Listening | None:
        """Return the socket that clients of a name come to."""
        node = self.get(name)
        return None if node is None or node.socket is None or node.socket.refuses else node.socket


def is_drawn(number: int, share: int) -> bool:
    """Whether the kernel draws a client or question for a share, each time the same."""
    return share > 0 and random.Random(f"drawn {number}").randrange(WHOLE) < share


class Address:
    """What clients connect to, and the sockets that are bound to it."""

    def __init__(self, family: int, name: Any, names: Names | None = None) -> None:
        """names: of all UNIX sockets."""
        self.family = family
        self.name = name
        self.names = Names() if names is None else names
        self.listening: list[Listening] = []  # in the order of listen(2)
        self.group: list[Listening] = []  # of SO_REUSEPORT, by place
        self.steered: int | None = None  # to which place
        self.marked: dict[str, int] = {}  # and those that come from these
        self.drawn = 0  # to which place a share of the others
        self.share = 0  # in ten thousandths
        #: A worker has done something to a socket, and that is not mended yet.
        self.disturbed = False
        self.clients: dict[int, Connection] = {}  # those that have begun to connect, until closed
        self.inodes = count(1)
        #: A configuration that is tried has added it: no client is promised anything yet.
        self.served = True
        #: No configuration that was read has removed it: no client is refused.
        self.kept = True
        self.added = 0  # how often, later
        self.harm = 0  # of workers, when it was removed: its clients may be lost by more of that

    @property
    def is_path(self) -> bool:
        """Whether it is a UNIX one with a file."""
        return isinstance(self.name, str) and self.name.startswith("/")

    @property
    def file(self) -> Listening | None:
        """Of UNIX: what has the name."""
        node = self.names.get(self.name)
        return node.socket if node is not None else None

    @property
    def path_inode(self) -> int:
        """And the file of that name, where it is a path."""
        node = self.names.get(self.name) if self.is_path else None
        return node.inode if node is not None else 0

    @property
    def by_number(self) -> bool:
        """Whether it is a port."""
        return self.family != socket.AF_UNIX

    @property
    def told(self) -> str:
        """As the settings have it."""
        if isinstance(self.name, tuple):
            return f"tcp:h:{self.name[1]}"
        return f"unix:{self.name}".replace("\0", "@")

    def for_new(self, number: int = 0, source: str = "") -> Listening | None:
        """Return the socket that a client gets to that connects now; None: it is refused."""
        if not self.by_number:
            return self.names.at(self.name)
        found = self._chosen(number, source)
        return None if found is None or (found.filtered and not found.drops) else found

    def all_for_new(self) -> set[Listening | None]:
        """Return all sockets that clients may get to that connect now."""
        found = {self.for_new()}
        if self.share and self.drawn < len(self.group):
            found.add(self.group[self.drawn])
        return found

    def _chosen(self, number: int, source: str) -> Listening | None:
        found = [each for each in self.listening if not each.elsewhere]
        if not found:
            return None
        # The kernel puts each in front of the others; but those of IPv6 that share a port, behind.
        first = found[0] if self.family == socket.AF_INET6 else found[-1]
        if not first.reuseport or first not in self.group:
            return first
        others = self.drawn if is_drawn(number, self.share) else self.steered
        steered = self.marked.get(source, others)
        if steered is not None and steered < len(self.group):
            return self.group[steered]
        return self.group[number % len(self.group)]

    def order(self) -> dict[int, int]:
        """What sock_diag reports of listening sockets: inode -> how they were shut down."""
        return {each.inode: each.mask for each in self.listening}

    def unread(self, in_handshake: bool) -> dict[bytes, bool]:
        """What sock_diag reports of unread, accepted clients -> whether they are silent."""
        left_out = [each for one in self.listening for each in one.backlog]
        return {
            b"%d" % each.number: not each.said and each.established
            for each in self.clients.values()
            if not each.heard and each not in left_out and not (in_handshake and each.established)
        }


class Listening(File):
    """A socket that listens, or is to, with its backlog."""

    def __init__(self, address: Address) -> None:
        """address: not taken until it is bound."""
        super().__init__()
        self.address = address
        self.inode = next(address.inodes)
        self.backlog: deque[Connection | Question] = deque()
        self.handshakes: deque[Connection] = deque()  # under way
        self.listens = False
        self.mask = 0  # of what shutdown() has ended
        self.filtered = False  # no new client comes in
        self.locked = False  # its filter is locked against changes by others
        self.reuseport = False
        self.options: dict[tuple[int, int], Any] = {}
        self.room = socket.SOMAXCONN
        self.port_zero = False  # the number was the kernel's choice
        self.astray = False  # and now it has another one
        self.nonblocking = True
        self.used = False  # some worker has had it: from then on its flags are theirs
        self.foreign = False  # it was passed in, and its owner changes them, too
        self.accepted = 0
        self.sent: dict[str, int] = {}  # the place of the last one sent on, by address
        self.question: Question | None = None  # what it has connected by, instead of listening
        self.bound_as = ""  # of UNIX
        self.node: Node | None = None  # and the file that it was given then

    @property
    def family(self) -> int:
        return self.address.family

    @property
    def refuses(self) -> bool:
        """Whether no new client comes in."""
        shut = bool(self.mask & 1) and not self.address.by_number
        return self.filtered or self.elsewhere or shut

    @property
    def elsewhere(self) -> bool:
        """Whether it is bound to a device that does not exist."""
        return bool(self.options.get((socket.SOL_SOCKET, BIND_TO_DEVICE)))

    @property
    def drops(self) -> bool:
        """Whether new clients get no answer."""
        return self.options.get((socket.IPPROTO_IP, IP_MINTTL)) == 255

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong with it."""
        shut = self.mask if self.address.by_number else self.mask & 1
        return self.listens and not (shut or self.astray or self.filtered or self.elsewhere)

    @property
    def full(self) -> bool:
        """Whether as many wait as may: then clients try again, and handshakes do not end."""
        return len(self.backlog) > self.room

    @property
    def name(self) -> Any:
        if not self.address.by_number:
            return self.bound_as
        return ASTRAY if self.astray else self.address.name

    def getsockname(self) -> Any:
        return self.name

    @property
    def own_file(self) -> str:
        """Where the file is that a socket of a path keeps for itself; "" if it has none."""
        names = self.address.names
        found = (name for name, node in names.items() if node is self.node and name.endswith("~"))
        return next(found, "")

    def ready(self) -> int:
        if self.question is not None:
            return OUT
        events = IN if self.backlog else 0
        if self.listens and self.address.by_number:
            return events
        if self.mask & 1:
            events |= IN | SHUT
        if self.mask == 3 or not self.listens:
            events |= HUP
        return events

    def bind(self, address: Address, name: str = "") -> None:
        """name: of one that is bound beside a path.

        Raises OSError (EADDRINUSE) where another one has the address and does not share it.
        """
        if not address.by_number:
            self.bound_as = name or address.name
            address.names.add(self.bound_as, self)
        else:
            self._share(address)
        self.address = address
        self.inode = next(address.inodes)

    def _share(self, address: Address) -> None:
        if any(not (self.reuseport and each.reuseport) for each in address.listening):
            raise failure(errno.EADDRINUSE)

    def set_flags(self, nonblocking: bool) -> None:
        """Have accept() wait or not, for all processes that have it."""
        assert not self.used or self.foreign, "the flags of living workers are changed"
        self.nonblocking = nonblocking

    def listen(self, room: int) -> None:
        """Have clients come, or set how many may wait.

        Raises OSError (EADDRINUSE) where another one listens and they do not share the port.
        """
        self.room = room
        if self.listens:
            return
        if self.address.by_number and not self.astray:
            self._share(self.address)
        self.listens = True
        if self.astray:
            return
        self.address.listening.append(self)
        group = self.address.group
        if self.reuseport and self not in group:
            others = [each for each in self.address.listening if each is not self]
            if not group and others and others[0].reuseport:
                group.append(others[0])
            group.append(self)

    def shutdown(self, how: int) -> None:
        """Raises OSError (ENOTCONN) where a TCP socket does not listen, as the kernel does."""
        if not self.address.by_number:
            self.mask |= _MASK[how]
        elif not self.listens:
            self.mask |= _MASK[how]
            raise failure(errno.ENOTCONN)
        elif how != socket.SHUT_WR:
            self._leave()
            self.mask = 0
            self.astray = self.port_zero

    def _leave(self) -> None:
        """Waiting clients are reset; and the last one of the group takes its place."""
        self.listens = False
        address = self.address
        if self in address.listening:
            address.listening.remove(self)
        if self in address.group:
            last = address.group.pop()
            if last is not self:
                address.group[address.group.index(self)] = last
            if not address.group:
                address.steered, address.marked, address.share = None, {}, 0
        for queue in (self.backlog, self.handshakes):
            while queue:
                queue.popleft().drop()

    def closed(self) -> None:
        self._leave()
        if self.node is not None:
            self.node.socket = None
            if not self.address.is_path:
                del self.address.names[self.bound_as]

    def attach(
        self, option: int, place: int, marked: dict[str, int], drawn: int = 0, share: int = 0
    ) -> None:
        """Attach a filter: one that refuses all, or one that steers.  Raises OSError."""
        if option == STEER:
            if self not in self.address.group:
                raise failure(errno.EINVAL)
            self.address.steered, self.address.marked = place, marked
            self.address.drawn, self.address.share = drawn, share
        elif self.locked:
            raise failure(errno.EPERM)
        else:
            self.filtered = True

    def set(self, level: int, option: int, value: Any) -> None:
        """As setsockopt(2)."""
        if (level, option) == (socket.SOL_SOCKET, socket.SO_REUSEPORT):
            self.reuseport = bool(value)
        elif (level, option) == (socket.SOL_SOCKET, DETACH_FILTER):
            if self.locked:
                raise failure(errno.EPERM)
            if not self.filtered:
                raise failure(errno.ENOENT)
            self.filtered = False
        else:
            self.options[level, option] = value

    def get(self, level: int, option: int) -> int:
        """As getsockopt(2) for a number."""
        match level, option:
            case socket.SOL_SOCKET, socket.SO_ACCEPTCONN:
                # That of a UNIX socket which was shut down says that it does.
                return int(self.listens)
            case socket.SOL_SOCKET, socket.SO_REUSEPORT:
                return int(self.reuseport)
            case socket.SOL_SOCKET, socket.SO_ERROR:
                lost = self.question is not None and self.question.over and not self.question.taken
                return errno.ECONNRESET if lost else 0
        unset = int(level == socket.IPPROTO_IP and option in _SET[self.family])
        found = self.options.get((level, option), unset)
        return found if isinstance(found, int) else 0

    getsockopt = get

    @property
    def key(self) -> int:
        """What sock_diag.file_key() returns."""
        return 1 << 32 | self.node.inode if self.node and self.address.is_path else 0

    @property
    def tag(self) -> int:
        """What the connections that it accepts are told by."""
        if not self.address.by_number:
            return self.key
        return accept_tags.tag_of(cast("Any", self))
