"""Drops privileges for good, except the few that are needed to start another user's workers.

With --worker-user the protector keeps only CAP_SETUID, CAP_SETGID and CAP_KILL.  Only the guard and
the protector's next program inherit these (`lent()`); other executed programs do not.

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
    """Become another user for good, with its groups and without capabilities.

    nice: the workers' nice value.  If it is below 0, first permit that user to set it.
    starts_others: keep the capabilities for starting and killing processes of a third user.
    Raises SystemRefused.
    """
    if os.getresuid() == (identity.uid,) * 3 != (0, 0, 0):
        return  # an earlier program has done so
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
        needed = "CAP_SETUID, CAP_SETGID" + (", CAP_KILL, CAP_SETPCAP" if starts_others else "")
        raise SystemRefused(
            f"cannot become {identity.user}: {error.strerror}; root needs {needed} for that"
        ) from error


def _may_have_capabilities() -> bool:
    """Return whether capabilities may be left after the change of user.

    They are left with SECBIT_NO_SETUID_FIXUP (capabilities(7)).  We read /proc, because prctl(2)
    would need ctypes just for this.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            found = [line.split() for line in file if line.startswith("Cap")]
    except OSError:
        return True
    return any(int(mask, 16) for name, mask in found if name != "CapBnd:")


def no_new_privileges() -> None:
    """Keep this process and its children from gaining privileges by set-user-id programs, for good.

    Raises OSError.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def become_subreaper() -> None:
    """Make this process the parent of the children of its dead children, also after an exec.

    Raises OSError.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(number: int) -> None:
    """Make the kernel signal this process when its parent's thread ends, also after an exec.

    Its own children do not inherit that.  Raises OSError.
    """
    _prctl(_PR_SET_PDEATHSIG, number)


def become_worker_user(identity: Identity) -> None:
    """Become a worker's user, without capabilities; for a forked child.  Raises OSError."""
    import ctypes  # noqa: F401 -- loaded now, because that user may be unable to read it

    change_user(identity)
    _set_capabilities(())


def use_files_as(identity: Identity) -> None:
    """Use files with another user's rights, and without capabilities; for a forked child.

    Nothing else changes, so that user can neither signal nor trace the child.  Raises OSError.
    Source: setfsuid(2).
    """
    os.setgroups(identity.groups)
    for call, number in (("setfsgid", identity.gid), ("setfsuid", identity.uid)):
        call_libc(call, number)
        if call_libc(call, number) != number:  # the first call cannot report a failure
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    _set_capabilities(())


def _bounding_set() -> Iterator[int]:
    """Yield the capabilities in the bounding set; an earlier program may have dropped some.

    The first number with EINVAL comes after the last capability.  /proc has the last number, too,
    but /proc may be missing.
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
    """Let executed programs have our capabilities until the block ends."""
    try:
        _set_capabilities(KEPT, inheritable=KEPT)
        for capability in KEPT:
            _prctl(_PR_CAP_AMBIENT, _AMBIENT_RAISE, capability)
        yield
    finally:
        reclaim()


def reclaim() -> None:
    """Let executed programs have no capabilities from now on."""
    _prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    _set_capabilities(KEPT)


def call_libc(function: str, *arguments: int | bytes) -> int:
    """Call a function of the C library that Python does not offer.  Raises OSError."""
    # Imported here: it costs half a megabyte, and few options, such as --worker-user, need it.
    import ctypes

    # unsigned long, because prctl(2) has variable arguments, which C does not convert.
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
    mask, inherited = (sum(1 << each for each in chosen) for chosen in (kept, inheritable))
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    data = struct.pack("6I", mask, mask, inherited, 0, 0, 0)
    call_libc("capset", header, data)
