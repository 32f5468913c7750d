"""Passes descriptors to the next program by name, and receives them.

Any predecessor of the resident process passes descriptors 3, 4, ... and their names, as systemd
does (sd_listen_fds(3)).  SocketProtector's names begin with `sp.`.

Names that are too long for the environment go into a memfd.  Then the environment has only the name
`sp.names.N`, with the number of the memfd.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:  # the guard imports this module, and must stay small
    from collections.abc import Collection, Iterable, Mapping

FIRST = 3
_DIGITS = 6
SETTINGS = "sp.settings"
LAUNCHER = "sp.launcher"  # the launching process waits at its end for the result of the start
TERMINAL = "sp.terminal"  # in the foreground: for the reason of a failed start
PID_FILE = "sp.pidfile"  # holds the lock
CURRENT = "sp.current"  # holds the lock of the link `current`
LISTENER = "sp.listener."  # + its index
SIBLING = "sp.twin."  # + its index: the other socket of its address, see reuseport.py
RESERVED = "sp.reserved."  # + its index: a third socket, for a hold
NOTIFY = "sp.notify"  # holds the lock of the folder of notify sockets
STATE = "sp.state"
GUARD = "sp.guard"  # the line to the guard
READER = "sp.reader"  # this process reads the configuration, and sends the result here
READER_DRY = "sp.reader.dry"  # the same, but it only reports what would change
PROBE = "sp.probe"  # this process only answers whether it could take over
CHECK = "sp.check"  # with PROBE: it also loads what only later processes of the program need
GENERATION = "sp.channel."  # + its number, .board; .read or .write, if it has a channel
WORKER = "sp.worker."  # + its number, .process, .notify or .line
HAND = "sp.hand."  # + a number: the connection whose send failed
CONTROL = "sp.control"  # the listening control socket
RELAY = "sp.relay."  # + read or write; or .process or .line, and its pid
OUTPUT = "sp.output."  # + number, generation and pid of a worker: the pipe of its output
WATCH = "sp.watch."  # + the watcher's pid, .process or .line
NAMES = "sp.names."  # + the number of the memfd that has the names
#: Longer names go into a memfd.  The environment, which may be almost full (execve(2)), must not
#: grow with the workers, or the guard could not start the next protector.
NAMES_BYTES = 4 * 1024
#: A string of the environment has at most 128 KiB, with the variable's name (execve(2)); this
#: limits systemd's fd store (docs/reliability.md).
STORE_NAMES_BYTES = 128 * 1024 - len("LISTEN_FDNAMES=") - 1
#: The name for an unused number between passed descriptors.
UNUSED = "sp.none"
OURS = "sp."
#: The variable with the pid of the process that gets the descriptors.
PID = "LISTEN_PID"
#: The variable with the rights that a root process of ours passes on (rights.py); STAY: its own.
RIGHTS, STAY = "SOCKETPROTECTOR_RIGHTS", "stay"
_VARIABLES = ("LISTEN_FDS", PID, "LISTEN_FDNAMES", "LISTEN_PIDFDID", RIGHTS)


class Named(dict[str, int]):
    """Descriptors by name, with the names that were recently added or removed, in order.

    With those names the fd store need not compare all names.  Change the dictionary only by
    `[name] = fd` and `del`.
    """

    def __init__(self) -> None:
        super().__init__()
        #: The fd store empties this when it has handled the names.
        self.changed: dict[str, None] = {}

    def __setitem__(self, name: str, fd: int) -> None:
        super().__setitem__(name, fd)
        self.changed[name] = None

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.changed[name] = None


class Inherited:
    """The descriptors of an earlier program, by name; each owner takes its descriptors once."""

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        """Take ownership of the descriptors."""
        # The keys are prefix and key (`sp.worker.`, `12`), so that take() needs only one look-up.
        self._left: dict[tuple[str, str], dict[str, int]] = {}
        for name, fd in descriptors.items():
            kind, key, rest = _parts(name)
            self._left.setdefault((kind, key), {})[rest] = fd

    def has(self, kind: str, key: int | str = "", rest: str = "") -> bool:
        """Return True if there is a descriptor `{kind}{key}.{rest}`."""
        return rest in self._left.get((kind, str(key)), {})

    def take(self, kind: str, key: int | str) -> dict[str, int]:
        """Return the descriptors `{kind}{key}.REST` by REST; the caller then owns them."""
        return self._left.pop((kind, str(key)), {})

    def take_one(self, name: str) -> int | None:
        """Return a descriptor, which the caller then owns; None if it is missing."""
        kind, key, rest = _parts(name)
        group = self._left.get((kind, key), {})
        found = group.pop(rest, None)
        if found is not None and not group:
            del self._left[kind, key]
        return found

    def take_all(self, kind: str) -> dict[str, dict[str, int]]:
        """Return all descriptors of a kind: `{kind}7.read` as {"7": {"read": fd}}.

        The caller then owns them.
        """
        keys = [key for each, key in self._left if each == kind]
        return {key: self._left.pop((kind, key)) for key in keys}

    def close(self) -> None:
        """Close the descriptors that no owner has taken; the earlier program was about to do so."""
        while self._left:
            for fd in self._left.popitem()[1].values():
                os.close(fd)


def _parts(name: str) -> tuple[str, str, str]:
    """Split `sp.worker.12.process` in three; a name without a key (`sp.settings`) is one part."""
    kind, dot, more = name.removeprefix(OURS).partition(".")
    key, _, rest = more.partition(".")
    return (f"{OURS}{kind}.", key, rest) if dot else (name, "", "")


def names(descriptors: Iterable[str]) -> dict[str, str]:
    """Return the variables that name descriptors at 3, 4, ..., without LISTEN_PID.

    Names that are too long go into a memfd that stays open over an exec.  If the caller does not
    execute a program, it must close the memfd.  Raises OSError.
    """
    found = tuple(descriptors)
    names = ":".join(found)
    if len(names) > NAMES_BYTES:
        fd = memory_file(NAMES, names.encode(), 0)
        names = f"{NAMES}{fd}"
    return {"LISTEN_FDS": str(len(found)), "LISTEN_FDNAMES": names, RIGHTS: STAY}


def memory_file(name: str, content: bytes, flags: int = os.MFD_CLOEXEC) -> int:
    """Make a memfd with this content; return its descriptor.

    Raises OSError, also if the limit of file sizes would cut the content off.
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
    """Lets descriptors survive an exec under their numbers; yields the variables that name them.

    No descriptor is moved, so after a failed exec, the end of the block undoes everything.
    """

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        self._fds = by_number = {fd: name for name, fd in descriptors.items()}
        last = max(by_number, default=FIRST - 1)
        self._names = [by_number.get(fd, UNUSED) for fd in range(FIRST, last + 1)]
        self._variables: dict[str, str] = {}

    def __enter__(self) -> dict[str, str]:
        """Make the descriptors inheritable; return the variables.  Raises OSError."""
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
    """Return the descriptors for this process by name; the caller owns them.

    This sets close-on-exec on each descriptor, and removes the variables from the environment.
    """
    count, pid, names, *_ = (os.environ.pop(variable, "") for variable in _VARIABLES)
    if pid != str(os.getpid()):
        return {}
    found = {}
    for name, fd in zip(_listed(names), range(FIRST, FIRST + number_in(count)), strict=False):
        if name == UNUSED:
            continue
        if name.startswith(OURS) and name not in found:
            found[name] = fd
            os.set_inheritable(fd, False)
        else:
            # A socket from socket activation, or a repeated name.  The first start has adopted such
            # sockets under our own names.
            os.close(fd)
    if (memfd := _memfd(names)) is not None:
        os.close(memfd)
    return found


def number_in(text: str) -> int:
    """Return the number in a variable; 0 if it is no number, or has too many digits."""
    is_number = text.isascii() and text.isdigit() and len(text) <= _DIGITS
    return int(text) if is_number else 0


def is_ours() -> bool:
    """Return True if this process inherits a state to resume: then the settings are not empty.

    After a graceful stop the settings are empty.
    """
    names = _listed_for_us()
    return SETTINGS in names and os.fstat(FIRST + names.index(SETTINGS)).st_size > 0


def belongs_to(settings_owners: Collection[int], state_owners: Collection[int]) -> bool:
    """Return True if only these users have made settings and state.  Raises OSError."""
    names = _listed_for_us()
    return all(
        os.fstat(FIRST + names.index(name)).st_uid in owners
        for name, owners in ((SETTINGS, settings_owners), (STATE, state_owners))
        if name in names
    )


def is_for_reader() -> bool:
    """Return True if this process is a configuration reader."""
    return not {READER, READER_DRY}.isdisjoint(_listed_for_us())


def _listed_for_us() -> list[str]:
    """Return the names of the descriptors for this process.  Raises OSError."""
    if os.environ.get(PID) != str(os.getpid()):
        return []
    count = number_in(os.environ.get("LISTEN_FDS", ""))
    return _listed(os.environ.get("LISTEN_FDNAMES", ""))[:count]


def _listed(names: str) -> list[str]:
    """Return the names in LISTEN_FDNAMES, or in the memfd that it names.  Raises OSError."""
    if (memfd := _memfd(names)) is not None:
        names = os.pread(memfd, os.fstat(memfd).st_size, 0).decode()
    return names.split(":")


def _memfd(names: str) -> int | None:
    number = names.removeprefix(NAMES)
    return (number_in(number) or None) if number != names else None
