"""The guard and the service manager: they start us, keep our descriptors, and get our messages.

A guard (programs/guard.py) keeps the descriptors, and its pid is the service's main pid.  Without a
guard, systemd keeps the descriptors if the unit has an fd store.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterable, Mapping

from ..model import exit_text
from ..system import inherited
from ..system.inherited import Named
from ..system.loop import Loop
from ..system.polling import read_now
from ..system.sd_notify import WATCHDOG, Outbox, Store, Systemd, parse, room_of

#: The size limit of a message from the guard.
_MESSAGE_BYTES = 4096
#: The most messages from the guard that one turn of the loop handles.  One message in each turn is
#: too slow: if hundreds of workers exit, many reports would be read too late (_STATUS_S of
#: post_mortem.py).
_READ_IN_A_TURN = 1024
#: How long finish() waits until the guard has room for our last messages.
_FAREWELL_S = 5.0
#: How long finish() waits for the service manager, which may have stopped reading.
_MANAGER_S = 1.0
#: The kinds of sockets that may change their names, because they change their roles.
_RENAMED = (inherited.LISTENER, inherited.SIBLING, inherited.RESERVED)


class SystemdStore(Store):
    """systemd's fd store.  It does not store a socket a second time under another name."""

    def __init__(self, outbox: Outbox, kept: Mapping[str, int], most: int) -> None:
        """Use the store behind an outbox; kept: the descriptors that came from it, by name."""
        super().__init__(outbox, kept, most=most, names_bytes=inherited.STORE_NAMES_BYTES)
        self._inodes = {n: os.fstat(kept[n]).st_ino for n in kept if n.startswith(_RENAMED)}

    def sync(
        self,
        few: Mapping[str, int],
        many: Named | None = None,
        write_state: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Make the store hold exactly these descriptors; first remove each socket's old name."""
        for name, fd in few.items():
            if fd >= 0 and name.startswith(_RENAMED) and name not in self._inodes:
                inode = os.fstat(fd).st_ino
                for old in self._inodes.keys() - few.keys():
                    if self._inodes[old] == inode:
                        self.forget(old)
                self._inodes[name] = inode
        for gone in self._inodes.keys() - few.keys():
            del self._inodes[gone]
        return super().sync(few, many, write_state)


class Parents:
    """The line (a socket) to the guard, our messages to guard and systemd, and the fd store.

    With a guard, `store` is the guard's, not systemd's.
    """

    def __init__(
        self, line: int | None, kept: Mapping[str, int], later: Callable[[Callable[[], None]], None]
    ) -> None:
        """Take ownership of the guard's line.

        kept: the descriptors that the guard or systemd's fd store already has, by name.
        later: calls a function after a short pause.
        """
        self.line = socket.socket(fileno=line) if line is not None else None
        self.guard = Outbox(later, self.line)
        self._manager = Outbox(later, address=os.environ.get("NOTIFY_SOCKET", ""))
        # A guard's pid is the service's main pid: the service ends when the guard exits.
        pid = os.getppid() if self.line is not None else os.getpid()
        self.systemd = Systemd(os.environ, pid, self._manager, self.guard)
        room = room_of(os.environ, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        # Pass the store's size on to the program that an upgrade executes.  That program cannot
        # compute the size: its getrlimit() returns the limit that we have raised, not systemd's.
        os.environ["FDSTORE"] = str(room)
        self.store = (
            Store(self.guard, kept)
            if self.line is not None
            else SystemdStore(self._manager, kept, room)
        )

    def watch(
        self, loop: Loop, on_exited: Callable[[int, bool, str], None], on_gone: Callable[[], None]
    ) -> None:
        """Read the guard's messages, and feed the watchdog.

        on_exited: called when the guard has reaped a process.  Its arguments: the process's pid,
        whether the exit was clean, and, in words, how the process exited.
        on_gone: called when the guard exits.  If there is no guard, called at once.
        """
        if self.line is None:
            on_gone()  # perhaps the guard exited just before an upgrade executed this program
        else:
            loop.watch(self.line.fileno(), lambda: self._read(loop, on_exited, on_gone))
        if self.systemd.watchdog_s:
            self._feed_watchdog(loop)

    def _read(
        self, loop: Loop, on_exited: Callable[[int, bool, str], None], on_gone: Callable[[], None]
    ) -> None:
        assert self.line is not None
        for _ in range(_READ_IN_A_TURN):
            data = read_now(self.line.recv, _MESSAGE_BYTES, socket.MSG_DONTWAIT)
            if data is None:
                return
            if not data:
                loop.unwatch(self.line.fileno())
                self.guard.close()
                self.systemd.pid = os.getpid()
                on_gone()
                return
            pid, _, status = parse(data).get("X_EXITED", "").partition(" ")
            if pid.isdigit() and status.isdigit():
                on_exited(int(pid), *exit_text.status_of(int(status)))

    def _feed_watchdog(self, loop: Loop) -> None:
        """Send WATCHDOG=1 to systemd now, and then every `watchdog_s`: half of WatchdogSec=."""
        self.systemd.send(WATCHDOG="1")
        loop.call_after(WATCHDOG, self.systemd.watchdog_s, lambda: self._feed_watchdog(loop))

    def descriptors(self) -> dict[str, int]:
        """Return the descriptor of the guard's line, by name; nothing if there is no guard."""
        if self.line is None or self.line.fileno() < 0:
            return {}
        return {inherited.GUARD: self.line.fileno()}

    def keeps_after_exit(self, names: Iterable[str]) -> bool:
        """Return whether systemd's fd store keeps the descriptors with these names for a restart.

        After our exit systemd keeps these descriptors only while a restart is pending (tested with
        systemd 252), or with FileDescriptorStorePreserve=yes.  Other service managers may
        receive sd_notify(3) messages, but keep no descriptors.  We recognize them because they set
        no $INVOCATION_ID.
        """
        systemd = self.line is None and bool(os.environ.get("INVOCATION_ID"))
        return systemd and self.store.holds(names)

    def finish(self, status: int, surviving: Iterable[str]) -> None:
        """Send our exit status; wait until all messages are sent, but only for a limited time.

        surviving: the names of the descriptors that stay in systemd's fd store for the next start.
        With a guard, these names are ignored: the guard exits, too, so it keeps no descriptor.
        """
        if self.line is None:
            self.store.sync(dict.fromkeys(surviving, -1))
        self.systemd.send(EXIT_STATUS=str(status))
        self.guard.finish(_FAREWELL_S)
        # Wait until the queued messages are sent: the next start needs the descriptors in them.
        self._manager.finish(_MANAGER_S)
