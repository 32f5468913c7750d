"""How the resident process inherits its descriptors by name, from any predecessor.

The predecessor names those at 3, 4, ..., as systemd does for a service (sd_listen_fds(3)); ours
begin with `sp.`.

Names that are too long for the environment are put into a memfd, and the only name in
the environment gives its number: `sp.names.N`.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:  # the guard imports this, and nothing that would make it larger
    from collections.abc import Iterable, Mapping

FIRST = 3
_DIGITS = 6
SETTINGS = "sp.settings"
LAUNCHER = "sp.launcher"  # where the launcher waits for a verdict
TERMINAL = "sp.terminal"  # in the foreground: where the reason of a failed start is said
PID_FILE = "sp.pidfile"  # holds the lock
LISTENER = "sp.listener."  # and its index
SIBLING = "sp.twin."  # the same: the other socket of its address, see reuseport.py
RESERVED = "sp.reserved."  # the same: a third one, for a hold
NOTIFY = "sp.notify"  # holds the lock of the folder of notify sockets
STATE = "sp.state"
GUARD = "sp.guard"  # the line to the guard
READER = "sp.reader"  # this process reads the configuration again, and answers there
READER_DRY = "sp.reader.dry"  # the same, only to say what would change
PROBE = "sp.probe"  # this process is only asked whether it could take over
CHANNEL = "sp.channel."  # and its generation, .read or .write
WORKER = "sp.worker."  # and its number, .process, .notify or .line
HAND = "sp.hand."  # and a number: the connection whose send failed
CONTROL = "sp.control"  # the listening control socket
RELAY = "sp.relay."  # read, write; .process or .line, and its pid
OUTPUT = "sp.output."  # number, generation and pid of a worker: what it writes
WATCH = "sp.watch."  # and the watcher's pid, .process or .line
NAMES = "sp.names."  # and the number of the memfd that has the names
#: One string of the environment has at most 128 KiB, with the variable's name (execve(2));
#: systemd's store (docs/reliability.md) is bound to that.
NAMES_BYTES = 120 * 1024
STORE_NAMES_BYTES = 128 * 1024 - len("LISTEN_FDNAMES=") - 1
#: Stands for a number in between that is not passed on.
NOBODY = "sp.none"
OURS = "sp."
#: The variable that says which process they are for.
PID = "LISTEN_PID"
_VARIABLES = ("LISTEN_FDS", PID, "LISTEN_FDNAMES", "LISTEN_PIDFDID")


class Named(dict[str, int]):
    """Descriptors by name, of which it is known which names have come or gone of late.

    So that the fd store need not compare all of them again.  Change it by `[name] = fd` and
    `del` alone.
    """

    def __init__(self) -> None:
        super().__init__()
        #: Emptied by the fd store, which takes note of them.
        self.changed: set[str] = set()

    def __setitem__(self, name: str, fd: int) -> None:
        super().__setitem__(name, fd)
        self.changed.add(name)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.changed.add(name)


class Inherited:
    """Descriptors that another program has left, by name: each is taken once, by its owner."""

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        """Take ownership of them."""
        # By prefix and key (`sp.worker.`, `12`), so that to take a thousand takes a thousand steps.
        self._left: dict[tuple[str, str], dict[str, int]] = {}
        for name, fd in descriptors.items():
            kind, key, rest = _parts(name)
            self._left.setdefault((kind, key), {})[rest] = fd

    def has(self, kind: str, key: int | str = "", rest: str = "") -> bool:
        """Whether there is `{kind}{key}.{rest}`."""
        return rest in self._left.get((kind, str(key)), {})

    def take(self, kind: str, key: int | str) -> dict[str, int]:
        """Give what is called `{kind}{key}.REST` to the caller, by REST; "" where there is none."""
        return self._left.pop((kind, str(key)), {})

    def take_one(self, name: str) -> int | None:
        """Give one to the caller, if it is there."""
        kind, key, rest = _parts(name)
        group = self._left.get((kind, key), {})
        found = group.pop(rest, None)
        if found is not None and not group:
            del self._left[kind, key]
        return found

    def take_all(self, kind: str) -> dict[str, dict[str, int]]:
        """Give all of a kind to the caller: `{kind}7.read` is {"7": {"read": fd}}."""
        keys = [key for each, key in self._left if each == kind]
        return {key: self._left.pop((kind, key)) for key in keys}

    def close(self) -> None:
        """Close what was not taken: it was on its way out when the other program ended."""
        while self._left:
            for fd in self._left.popitem()[1].values():
                os.close(fd)


def _parts(name: str) -> tuple[str, str, str]:
    """Split `sp.worker.12.process`; what has no key, as `sp.settings`, is one part."""
    kind, dot, more = name.removeprefix(OURS).partition(".")
    key, _, rest = more.partition(".")
    return (f"{OURS}{kind}.", key, rest) if dot else (name, "", "")


def names(descriptors: Iterable[str]) -> dict[str, str]:
    """Return the variables that name descriptors at 3, 4, ..., without the pid they are for.

    Too long, they go into a memfd that an exec leaves open; a caller that does not execute
    anything closes it.  Raises OSError.
    """
    found = tuple(descriptors)
    names = ":".join(found)
    if len(names) > NAMES_BYTES:
        fd = memory_file(NAMES, names.encode(), 0)
        names = f"{NAMES}{fd}"
    return {"LISTEN_FDS": str(len(found)), "LISTEN_FDNAMES": names}


def memory_file(name: str, content: bytes, flags: int = os.MFD_CLOEXEC) -> int:
    """Make a memfd with this content; return its descriptor.

    Raises OSError, also where the limit of file sizes would cut the content off.
    """
    fd = os.memfd_create(name, flags)
    try:
        if os.pwrite(fd, content, 0) != len(content):
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    except BaseException:
        os.close(fd)
        raise
    return fd


class kept_through_exec:
    """Lets descriptors survive an exec where they are; gives the variables that name them.

    Nothing is moved, so that all is undone at the end of the block: if the exec fails.
    """

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        self._fds = by_number = {fd: name for name, fd in descriptors.items()}
        last = max(by_number, default=FIRST - 1)
        self._names = [by_number.get(fd, NOBODY) for fd in range(FIRST, last + 1)]
        self._variables: dict[str, str] = {}

    def __enter__(self) -> dict[str, str]:
        """Make them inheritable.  Raises OSError."""
        self._variables = names(self._names)
        for fd in self._fds:
            os.set_inheritable(fd, True)
        return {PID: str(os.getpid()), **self._variables}

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.set_inheritable(fd, False)
        if (memfd := _memfd(self._variables["LISTEN_FDNAMES"])) is not None:
            os.close(memfd)


def receive() -> dict[str, int]:
    """Return name -> descriptor of what was left for this process; the caller owns them.

    Sets close-on-exec on each and removes the variables from the environment.
    """
    count, pid, names, _ = (os.environ.pop(variable, "") for variable in _VARIABLES)
    if pid != str(os.getpid()):
        return {}
    found = {}
    for name, fd in zip(_listed(names), range(FIRST, FIRST + number_in(count)), strict=False):
        if name == NOBODY:
            continue
        if name.startswith(OURS) and name not in found:
            found[name] = fd
            os.set_inheritable(fd, False)
        else:
            # What else the service manager passes (socket activation) was taken at the first
            # start and is among ours; several may have one name.
            os.close(fd)
    if (memfd := _memfd(names)) is not None:
        os.close(memfd)
    return found


def number_in(text: str) -> int:
    """Return what a variable says of descriptors; 0 for more than any process has."""
    is_number = text.isascii() and text.isdigit() and len(text) <= _DIGITS
    return int(text) if is_number else 0


def is_ours() -> bool:
    """Whether descriptors were left for this very process, our settings among them.

    They are empty after a graceful stop: then there is nothing to resume.
    """
    names = _listed_for_us()
    return SETTINGS in names and os.fstat(FIRST + names.index(SETTINGS)).st_size > 0


def is_for_reader() -> bool:
    """Whether this process is to read a configuration again."""
    return not {READER, READER_DRY}.isdisjoint(_listed_for_us())


def _listed_for_us() -> list[str]:
    """Return the names of descriptors that were left for this very process.  Raises OSError."""
    ours = os.environ.get(PID) == str(os.getpid())
    return _listed(os.environ.get("LISTEN_FDNAMES", "")) if ours else []


def _listed(names: str) -> list[str]:
    """Return the names that LISTEN_FDNAMES tells, or tells where to find.  Raises OSError."""
    if (memfd := _memfd(names)) is not None:
        names = os.pread(memfd, os.fstat(memfd).st_size, 0).decode()
    return names.split(":")


def _memfd(names: str) -> int | None:
    number = names.removeprefix(NAMES)
    return (number_in(number) or None) if number != names else None
