"""Who we are allowed to be: drop to a user for good, and start workers as another one.

With --worker-user the protector keeps CAP_SETUID, CAP_SETGID and CAP_KILL and nothing else.
They reach a program that it executes only where that is wanted: `lent()`.

Source: capabilities(7), prctl(2), capset(2), setpriv(1).
"""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import SystemRefused
from .settings import Identity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import CDLL

_CAP_KILL, _CAP_SETGID, _CAP_SETUID = 5, 6, 7
KEPT = (_CAP_KILL, _CAP_SETGID, _CAP_SETUID)
_LAST_CAP = 40
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 47, 2, 4
_CAPABILITY_VERSION_3 = 0x20080522
#: Executes a program as another user with nothing of ours; from util-linux.
_SETPRIV = "/usr/bin/setpriv"


def become(identity: Identity, nice: int, *, starts_others: bool) -> None:
    """Drop to another user for good, supplementary groups and capabilities too.

    nice: what workers are to have; a value below 0 is allowed to that user before.
    starts_others: keep what starting and killing processes of yet another user takes.
    Raises SystemRefused.
    """
    if os.getresuid() == (identity.uid,) * 3 != (0, 0, 0):
        return  # an earlier program has
    try:
        if nice < 0:
            resource.setrlimit(resource.RLIMIT_NICE, (20 - nice, 20 - nice))
        if starts_others:
            _prctl(_PR_SET_KEEPCAPS, 1)
            for capability in range(_LAST_CAP + 1):
                if capability not in KEPT:
                    _prctl(_PR_CAPBSET_DROP, capability)
        os.setgroups(identity.groups)
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
        if starts_others:
            _keep_only(KEPT)
    except OSError as error:
        raise SystemRefused(
            f"cannot become {identity.user}: {error.strerror}; root without CAP_SETUID and "
            "CAP_SETGID cannot"
        ) from error


def no_new_privileges() -> None:
    """Let nothing that this process executes gain privileges (set-user-id programs).

    For its children too, and never undone.  Raises OSError.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def adopt_orphans() -> None:
    """Make this process, and what it executes, the parent of what a dead child leaves.

    Raises OSError.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def as_user(identity: Identity, path: str, argv: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return (path, argv) that executes a program as this user, with no capability of ours."""
    # A script is known by its real path anyway; another program by the name it goes by.
    program = argv[0] if os.path.isabs(argv[0]) else path
    groups = ",".join(map(str, identity.groups))
    return _SETPRIV, (
        *("setpriv", f"--reuid={identity.uid}", f"--regid={identity.gid}"),
        *((f"--groups={groups}",) if groups else ("--clear-groups",)),
        *("--inh-caps=-all", "--ambient-caps=-all", "--", program, *argv[1:]),
    )


@contextmanager
def lent() -> Iterator[None]:
    """While this lasts, what is executed has the capabilities that we keep."""
    for capability in KEPT:
        _prctl(_PR_CAP_AMBIENT, _AMBIENT_RAISE, capability)
    try:
        yield
    finally:
        reclaim()


def reclaim() -> None:
    """Let nothing that we execute from here on have our capabilities."""
    _prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)


def _libc() -> CDLL:
    # Half a megabyte, and only where privileges are in play.
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *arguments: int) -> None:
    import ctypes

    if _libc().prctl(option, *(ctypes.c_ulong(each) for each in (*arguments, 0, 0, 0, 0)[:4])):
        _raise(ctypes.get_errno())


def _keep_only(capabilities: tuple[int, ...]) -> None:
    """Have these capabilities permitted, effective and inheritable, and no others."""
    import ctypes

    mask = sum(1 << each for each in capabilities)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    data = struct.pack("6I", mask, mask, mask, 0, 0, 0)
    if _libc().capset(header, data):
        _raise(ctypes.get_errno())


def _raise(number: int) -> None:
    raise OSError(number, os.strerror(number))
