"""The rights of the resident process: what the command line and root's configuration file say.

The launching process becomes the user of --user before it executes the resident process.  So a
program that inherits our descriptors as root was started by one of these:

- a protector that is root itself: its next program, or a helper; the rights stay as they are;
- systemd, after a crash: keep_or_read() reads the command line and the file again.

systemd's descriptor store is no source of rights.  The service's user can write the memfds in it,
and can store descriptors under any name.  So the process becomes that user before it reads them.

Source: sd_notify(3), FDSTORE=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ..model.codec import Codec
from ..model.errors import Mistaken, Refusal
from ..model.lazy_dataclass import frozen
from ..model.settings import Identity, Settings
from ..model.text import escape
from ..system import inherited, privileges
from ..system.terminal import tell

#: The exit status after which a service manager tries again.
_AGAIN = 1


@frozen
class Rights:
    """The user that a process becomes for good, and what it may do as that user."""

    identity: Identity | None = None  # None: the process stays root
    nice: int = 0  # below 0: the user may set this nice value
    starts_others: bool = False  # keep the capabilities for another user's workers
    no_new_privileges: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Rights:
        """Return the rights that settings name."""
        starts_others = settings.worker_identity is not None
        return cls(settings.identity, settings.nice, starts_others, settings.no_new_privileges)

    @property
    def uid(self) -> int:
        return self.identity.uid if self.identity is not None else 0

    @property
    def settings_owner(self) -> int:
        """The owner of the settings that a start makes for these rights.

        Root where the protector keeps capabilities: no protector without them can make such a file.
        """
        return 0 if self.starts_others else self.uid

    def become(self) -> None:
        """Become the user, and give up all other rights, for good.  Raises OSError, Refusal."""
        if self.no_new_privileges:
            privileges.no_new_privileges()
        if self.identity is not None:
            privileges.become(self.identity, self.nice, starts_others=self.starts_others)


_CODEC = Codec((Rights, Identity), strict=(Rights, Identity))


class Reading:
    """A child that reads the rights for a root process, while the process loads its program.

    A child, because the modules for that would take memory for good.
    """

    def __init__(self, words: Sequence[str], read: Callable[[Sequence[str]], Rights]) -> None:
        """Start the child.

        words: the command line.  read: reads it, and its configuration file.
        """
        self._readable, writable = os.pipe2(os.O_CLOEXEC)
        self._child = os.fork()
        if self._child == 0:
            status = _AGAIN
            try:
                os.write(writable, _CODEC.encode(read(words)))
                status = 0
            except Refusal as error:
                why = error if isinstance(error, Mistaken) else escape(str(error))
                tell(f"cannot resume: {why}")
            finally:
                os._exit(status)
        os.close(writable)

    def take(self) -> None:
        """Take the rights that the child has read; if there are none, exit."""
        with open(self._readable, "rb") as file:
            found = file.read()
        _, status = os.waitpid(self._child, 0)
        if status:
            raise SystemExit(_AGAIN)
        take(_CODEC.decode(found))


def keep_or_read(
    words: Sequence[str], read: Callable[[Sequence[str]], Rights]
) -> Callable[[], None]:
    """Begin to find the rights of this root process; return what takes them, or exits.

    For arguments see Reading.
    """
    if os.environ.get(inherited.RIGHTS) == inherited.STAY:
        return lambda: None
    # A protector of an earlier version sets no variable, and shows no option in `ps`.
    end = words.index("--") if "--" in words else len(words)
    if any(each.startswith("-") for each in words[:end]):
        return Reading(words, read).take
    return lambda: take(Rights())


def take(rights: Rights) -> None:
    """Become the user that the rights name.

    If that fails, or if another user has made settings or state, exit so that systemd tries again.
    """
    # Settings of an earlier version belong to root.
    if not inherited.belongs_to({0, rights.settings_owner}, {0, rights.uid}):
        tell(
            "cannot resume: another user has made the stored state; set --user and --worker-user "
            "back, or stop and start"
        )
        raise SystemExit(_AGAIN)
    try:
        rights.become()
    except (Refusal, OSError) as error:
        tell(f"cannot resume: {escape(str(error))}")
        raise SystemExit(_AGAIN) from error
