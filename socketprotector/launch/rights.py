"""The rights of the resident process: what the command line and root's configuration file say.

The launching process becomes the user of --user before it executes the resident process.  So a
program that inherits our descriptors as root was started by one of these:

- a protector that is root itself: its next program, or a helper; the rights stay as they are;
- systemd, after a crash: to_take() reads the command line and the file again.

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

    def become(self) -> None:
        """Become the user, and give up all other rights, for good.  Raises OSError, Refusal."""
        if self.no_new_privileges:
            privileges.no_new_privileges()
        if self.identity is not None:
            privileges.become(self.identity, self.nice, starts_others=self.starts_others)


_CODEC = Codec((Rights, Identity), strict=(Rights, Identity))


#: Reads a command line and its configuration file.
Read = Callable[[Sequence[str]], Rights]


def to_take(words: Sequence[str], read: Read) -> Rights | None:
    """Return the rights that this root process must take; None: a root protector executes it.

    words: the command line.  If it cannot be read, this exits.
    """
    if os.environ.get(inherited.RIGHTS) == inherited.STAY:
        return None
    # A protector of an earlier version sets no variable, and shows no option in `ps`.
    end = words.index("--") if "--" in words else len(words)
    if not any(each.startswith("-") for each in words[:end]):
        return Rights()
    found = _CODEC.decode(_read_by_child(words, read))
    assert isinstance(found, Rights)
    return found


def take(rights: Rights) -> None:
    """Become the user that the rights name.

    If that fails, or if another user has made settings or state, exit so that systemd tries again.
    """
    if not inherited.belongs_to(rights.uid):
        tell(
            "cannot resume: another user has made the stored state; set --user back, or stop and "
            "start"
        )
        raise SystemExit(_AGAIN)
    try:
        rights.become()
    except (Refusal, OSError) as error:
        tell(f"cannot resume: {escape(str(error))}")
        raise SystemExit(_AGAIN) from error


def _read_by_child(words: Sequence[str], read: Read) -> bytes:
    """Let a child read the command line: the modules for that would take memory for good."""
    readable, writable = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        status = _AGAIN
        try:
            os.write(writable, _CODEC.encode(read(words)))
            status = 0
        except Refusal as error:
            tell(f"cannot resume: {error if isinstance(error, Mistaken) else escape(str(error))}")
        finally:
            os._exit(status)
    os.close(writable)
    with open(readable, "rb") as file:
        found = file.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(_AGAIN)
    return found
