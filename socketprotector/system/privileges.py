"""Drops to a user for good, and lets workers be started as another user.

With --worker-user the protector keeps CAP_SETUID, CAP_SETGID and CAP_KILL and nothing else.
Programs it executes do not inherit them, except its own successor (`lent()`).

Source: capabilities(7), prctl(2), capset(2).
"""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from ..model.errors import SystemRefused
from ..model.settings import Identity

_CAP_KILL, _CAP_SETGID, _CAP_SETUID = 5, 6, 7
KEPT = (_CAP_KILL, _CAP_SETGID, _CAP_SETUID)
_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 47, 2, 4
_CAPABILITY_VERSION_3 = 0x20080522


def become(identity: Identity, nice: int, *, starts_others: bool) -> None:
    """Drop to another user for good, supplementary groups and capabilities too.

    nice: what workers are to have; a value below 0 is allowed to that user before.
    starts_others: keep what starting and killing processes of yet another user takes.
    Raises SystemRefused.
    """
    if os.getresuid() == (identity.uid,) * 3 != (0, 0, 0):
        return  # an earlier program has
    if nice < 0:
        try:
            resource.setrlimit(resource.RLIMIT_NICE, (20 - nice, 20 - nice))
        except (OSError, ValueError) as error:
            raise SystemRefused(
                f"cannot allow {identity.user} nice {nice}: {error}; root without "
                "CAP_SYS_RESOURCE cannot"
            ) from error
    try:
        if starts_others:
            _prctl(_PR_SET_KEEPCAPS, 1)
            for capability in _bounding_set():
                if capability not in KEPT:
                    _prctl(_PR_CAPBSET_DROP, capability)
        change_user(identity)
        if starts_others:
            _set_capabilities(KEPT)
        elif identity.uid != 0 and _may_have_capabilities():
            _prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
            _set_capabilities(())
    except OSError as error:
        raise SystemRefused(
            f"cannot become {identity.user}: {error.strerror}; root without CAP_SETUID and "
            "CAP_SETGID cannot"
        ) from error


def _may_have_capabilities() -> bool:
    """Say whether a change of the user has left some (SECBIT_NO_SETUID_FIXUP, capabilities(7)).

    Not asked of prctl(2), which usually would be called for this alone.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            found = [line.split() for line in file if line.startswith("Cap")]
    except OSError:
        return True
    return any(int(mask, 16) for name, mask in found if name != "CapBnd:")


def no_new_privileges() -> None:
    """Let nothing that this process executes gain privileges (set-user-id programs).

    For its children too, and never undone.  Raises OSError.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def adopt_group() -> None:
    """Make this process, and what it executes, the parent of what a dead child leaves.

    Raises OSError.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(number: int) -> None:
    """Make the kernel signal this process when its parent's thread ends, also after exec.

    Its own children do not have that.  Raises OSError.
    """
    _prctl(_PR_SET_PDEATHSIG, number)


def hand_over(identity: Identity) -> None:
    """Become a user that a worker runs as, with no capability; for a forked child.

    Raises OSError.
    """
    import ctypes  # noqa: F401 -- loaded by us: that user need not be able to read it

    change_user(identity)
    _set_capabilities(())


def _bounding_set() -> Iterator[int]:
    """Return what is in it still: an earlier program may have dropped from it.

    The kernel knows no capability behind the first that it takes for a mistake; it says the
    last in /proc, too, which may not be there.
    """
    for capability in count():
        try:
            if _prctl(_PR_CAPBSET_READ, capability):
                yield capability
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return


def change_user(identity: Identity) -> None:
    """Become another user, with its groups and no others.  Raises OSError."""
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)


@contextmanager
def lent() -> Iterator[None]:
    """While this lasts, what is executed has the capabilities that we keep."""
    try:
        _set_capabilities(KEPT, inheritable=KEPT)
        for capability in KEPT:
            _prctl(_PR_CAP_AMBIENT, _AMBIENT_RAISE, capability)
        yield
    finally:
        reclaim()


def reclaim() -> None:
    """Let nothing that we execute from here on have our capabilities."""
    _prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    _set_capabilities(KEPT)


def call_libc(function: str, *arguments: int | bytes) -> int:
    """Call a function of the C library that Python has no name for.  Raises OSError."""
    # Half a megabyte, and only where privileges are in play, or a socket file is given away.
    import ctypes

    # Each number as wide as a register: prctl(2) takes unsigned longs, and cannot tell C so.
    words = (ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments)
    result = int(getattr(ctypes.CDLL(None, use_errno=True), function)(*words))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _prctl(option: int, *arguments: int) -> int:
    return call_libc("prctl", option, *(*arguments, 0, 0, 0, 0)[:4])


def _set_capabilities(kept: tuple[int, ...], inheritable: tuple[int, ...] = ()) -> None:
    """Set the permitted and effective capabilities to exactly these."""
    mask, inherited = (sum(1 << each for each in those) for those in (kept, inheritable))
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    data = struct.pack("6I", mask, mask, inherited, 0, 0, 0)
    call_libc("capset", header, data)
