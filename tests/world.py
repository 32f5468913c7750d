"""The world of a run of tests: its own network, /run and temporary files.

A run that may make namespaces (root's, or a user's where user namespaces are allowed) has its own
ports, abstract names, /run and /tmp, so that neither the machine nor another run changes a result.
Its /tmp is in memory, which costs less, and is gone with it; --shared-world keeps what tests leave.
Without them tests run all the same: each uses free ports and folders of its own.

Source: unshare(2), user_namespaces(7), mount(2), netdevice(7), capget(2).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x1000, 0x4000, 0x40000, 2
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def enter(clone: Path) -> str:
    """Give this process its own world; return "" or why it shares the machine's."""
    why = _why_not(clone)  # in a child, as there is no way back from the half of it
    if not why:
        _enter(clone)
    return why


def _why_not(clone: Path) -> str:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _enter(clone)
        except BaseException as error:
            os.write(send, (str(error) or repr(error)).encode())
        os._exit(0)
    os.close(send)
    with open(receive, encoding="utf-8") as file:
        why = file.read()
    os.waitpid(child, 0)
    return why


def _enter(clone: Path) -> None:
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        _unshare(_CLONE_NEWNS | _CLONE_NEWNET)
    else:
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWNET)
        _be(uid, gid)
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    needed = (clone, Path(sys.prefix), Path(sys.base_prefix))
    _mount("run", "/run", "tmpfs", 0, "mode=0755")
    _have_own_tmp(needed)
    Path("/run/systemd").mkdir()  # systemd-analyze wants it
    _raise_loopback()
    if uid == 0:
        _let_others_reach(*needed)
    else:
        Path("/run").chmod(0o555)  # the user's own there, and only root may write to the machine's
        _give_up_rights()


def _checked(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def _be(uid: int, gid: int) -> None:
    """Stay the same user in the new user namespace."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        Path(f"/proc/self/{name}").write_text(text)


def _mount(source: str, target: Path | str, kind: str, flags: int, data: str = "") -> None:
    given = [each.encode() for each in (source, str(target), kind)]
    _checked(_libc.mount(*given, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        fcntl.ioctl(one, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def _give_up_rights() -> None:
    """Have no right that the user does not have on the machine."""
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, bytes(24)), "capset")


def _have_own_tmp(needed: Iterable[Path]) -> None:
    """Put a folder in memory in the place of /tmp, with what is needed of it."""
    inside = {Path(*each.parts[:3]) for each in needed if each.is_relative_to("/tmp")}
    with tempfile.TemporaryDirectory(dir="/run") as place:
        _mount("/tmp", place, "", _MS_BIND | _MS_REC)
        _mount("tmp", "/tmp", "tmpfs", 0, "mode=1777")
        _bind_all((Path(place) / each.name for each in inside), Path("/tmp"))
        _checked(_libc.umount2(place.encode(), _MNT_DETACH), "umount")


def _let_others_reach(*paths: Path) -> None:
    """Let every user go to these paths, in this mount namespace alone.

    The machine's folders keep their modes, so no other process gets anywhere.
    """
    folders = {each for path in paths for each in path.resolve().parents}
    for folder in sorted(folders):
        if not folder.stat().st_mode & stat.S_IXOTH:
            _open(folder)


def _open(folder: Path) -> None:
    """Put a folder in its place that everyone may pass, with all that was in it."""
    with tempfile.TemporaryDirectory(dir="/run") as place:
        _mount(str(folder), place, "", _MS_BIND | _MS_REC)
        try:
            mode = stat.S_IMODE(folder.stat().st_mode) | 0o011
            _mount("open", folder, "tmpfs", 0, f"mode={mode:o}")
            _bind_all(Path(place).iterdir(), folder)
        finally:
            _checked(_libc.umount2(place.encode(), _MNT_DETACH), "umount")


def _bind_all(entries: Iterable[Path], folder: Path) -> None:
    for each in entries:
        target = folder / each.name
        if each.is_symlink():
            target.symlink_to(os.readlink(each))
            continue
        if each.is_dir():
            target.mkdir()
        else:
            target.touch()
        _mount(str(each), target, "", _MS_BIND | _MS_REC)
