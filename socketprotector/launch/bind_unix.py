"""Binds UNIX sockets.  A stale file is replaced; a socket that is in use is not.

Source: unix(7), bind(2).
"""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
import struct
from functools import cache

from ..model.errors import SystemRefused, UsageError
from ..model.settings import Identity, ListenerSettings
from ..system import socket_file
from ..system.cleanup import on_error
from ..system.dir_lock import give, locked
from ..system.privileges import call_libc
from ..system.sock_diag import is_bound_to
from . import port_owner
from .listen_spec import Listen, gid_of, uid_of
from .pid_file import hint
from .user_access import as_user, refuse_unwritable

#: From linux/fcntl.h.
_AT_EMPTY_PATH = 0x1000
#: Tags from linux/posix_acl.h, in the order that an access control list must have.
_ACL_USER_OBJ, _ACL_GROUP_OBJ, _ACL_GROUP, _ACL_MASK, _ACL_OTHER = 0x01, 0x04, 0x08, 0x10, 0x20


def bind_unix(
    listen: Listen, path: str, backlog: int | None, *, beside: bool = False
) -> tuple[socket.socket, ListenerSettings]:
    """Bind a path or @name, and listen.  Raises SystemRefused.

    The caller owns the socket, and the file that the settings name.
    backlog: None: only check that the bind would work.
    beside: bind a file beside the path, so that the path can lead to different sockets over time
    (system/socket_file.py).
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with on_error(sock.close):
            if beside and backlog is not None:
                sock.close()
                return _bind_beside(listen, path, backlog)
            if path.startswith("@"):
                sock.bind("\0" + path[1:])
                if backlog is not None:
                    sock.listen(backlog)
                settings = ListenerSettings(f"unix:{path}", backlog=backlog or 0)
            else:
                settings = _bind_path(sock, listen, path, backlog)
    except OSError as error:
        what = f"cannot listen on {listen.text}: {error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            raise SystemRefused(f"{what}; {port_owner.of_path(path)}") from error
        if error.errno == errno.EEXIST:
            raise SystemRefused(f"{what}; remove it, or choose another path") from error
        if error.errno == errno.EPERM and {"user", "group"} & set(listen.options):
            raise SystemRefused(f"{what}; only root can change a socket's owner") from error
        raise SystemRefused(f"{what}; {hint(error, 'the options, the folder')}") from error
    return sock, settings


def _bind_path(
    sock: socket.socket, listen: Listen, path: str, backlog: int | None
) -> ListenerSettings:
    """Bind a socket file.  A stale file is replaced; a file in use is an error."""
    with locked(path) as there:
        stale = socket_file.is_stale(there)
        if backlog is None:
            refuse_unwritable(os.path.dirname(path))
            return ListenerSettings(f"unix:{path}")
        if stale:
            os.unlink(there)
        mode = listen.options.get("mode")
        # Set the mode by umask, not chmod, so that the file never has another mode.
        before = os.umask(0o777 & ~int(mode, 8)) if mode is not None else None
        try:
            sock.bind(path)
        finally:
            if before is not None:
                os.umask(before)
        with on_error(os.unlink, there):
            found = _give(sock, there, listen)
            # Listen under the lock: before listen(), another start would see a stale file.
            sock.listen(backlog)
    return ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino, backlog)


def _bind_beside(listen: Listen, path: str, backlog: int) -> tuple[socket.socket, ListenerSettings]:
    """Bind a socket beside its path, and make the path lead to the socket.  Raises OSError."""
    uid, gid, mode = rights_of_new(listen, path)
    uid = uid if "user" in listen.options else -1
    gid = gid if "group" in listen.options else -1
    with locked(path) as there:
        stale = socket_file.is_stale(there)
        socket_file.remove_leftovers(path)
        made = socket_file.bind(path, backlog, socket_file.Rights(uid, gid, mode), give_away)
        with on_error(made.close), on_error(socket_file.forget, path, made):
            made.setblocking(False)
            if stale:
                os.unlink(there)
            socket_file.lead_to(path, made, ())
            device, inode = socket_file.identity_of(path, made)
    settings = ListenerSettings(f"unix:{path}", device, inode, backlog, beside=True)
    return made, settings


def why_alone(listen: Listen, path: str, identity: Identity | None) -> str:
    """Return why generations cannot have their own sockets at a path, with advice; "" if they can.

    identity: the user that makes these sockets; None means the current user.
    """
    if path.startswith("@"):
        return "its name is abstract: use unix:PATH"
    if not socket_file.has_room(path):
        return "its path is too long: use a shorter one"
    folder = os.path.dirname(path) or "/"
    try:
        uid, gid, mode = rights_of_new(listen, path)
        setgid = bool(os.stat(folder).st_mode & stat.S_ISGID)
    except (OSError, UsageError):
        return ""  # the bind will report the error
    if identity is None or identity.uid == 0:
        return ""
    user, missing = identity.user, []
    if not _may_write(identity, folder):
        missing.append(f"user {user} cannot make files in {folder}: chown {user} {folder}")
    if uid != identity.uid:
        missing.append(f"the socket does not belong to user {user}: add ?user={user}")
    # The group matters only if its members may write to the socket, and so connect.  In a setgid
    # folder, the folder's group is the socket's group, whichever user makes the socket.
    group_matters = bool(mode & stat.S_IWGRP) and not setgid
    if group_matters and gid not in (identity.gid, *identity.groups):
        advice = f"add --group {_group_name(gid)}" if "group" in listen.options else "add ?group="
        missing.append(f"user {user} is not in the socket's group {_group_name(gid)}: {advice}")
    return "; ".join(missing)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


@cache
def _may_write(identity: Identity, folder: str) -> bool:
    return not as_user(
        identity, lambda: "" if os.access(folder, os.W_OK | os.X_OK) else "it may not"
    )


def admit_group(sock: socket.socket, path: str, gid: int, owner: int) -> None:
    """Let another group use the file of a bound socket, by an access control list.

    owner: the file's new owner; -1: the owner stays.  The list is set before the owner is changed:
    without CAP_FOWNER, as under the shipped units, root can set a list only on its own file.

    Raises OSError if the file system has no such lists, or /proc is missing.
    Source: acl(5); linux/posix_acl_xattr.h.
    """
    read_write, nothing, no_id = 6, 0, 0xFFFFFFFF
    entries = (
        (_ACL_USER_OBJ, read_write, no_id),
        (_ACL_GROUP_OBJ, read_write, no_id),
        (_ACL_GROUP, read_write, gid),
        (_ACL_MASK, read_write, no_id),
        (_ACL_OTHER, nothing, no_id),
    )
    packed = b"".join(struct.pack("<HHI", *each) for each in entries)
    file = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not is_bound_to(sock, file):
            raise OSError(errno.EEXIST, "another file has replaced the socket's file")
        by_fd = f"/proc/self/fd/{file}"
        os.setxattr(by_fd, "system.posix_acl_access", struct.pack("<I", 2) + packed)
        os.chown(by_fd, owner, -1)
    finally:
        os.close(file)


def reapply_options(
    sock: socket.socket, listen: Listen, path: str, backlog: int
) -> ListenerSettings:
    """Set up an inherited listening socket as bind_unix() would.  Raises OSError.

    path: the path in the argument, to which the socket is bound.
    """
    if path.startswith("@"):
        sock.listen(backlog)
        return ListenerSettings(f"unix:{path}", backlog=backlog)
    uid, gid, mode = rights_of_new(listen, path)
    with locked(path) as there:
        file = os.open(there, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(file)
            if not (stat.S_ISSOCK(found.st_mode) and is_bound_to(sock, file)):
                raise OSError(errno.EEXIST, "another file has replaced the socket's file")
            if (found.st_uid, found.st_gid) != (uid, gid):
                give_away(file, uid, gid)
            if stat.S_IMODE(found.st_mode) != mode:
                os.chmod(f"/proc/self/fd/{file}", mode)
        finally:
            os.close(file)
        sock.listen(backlog)
    return ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino, backlog)


def rights_of_new(listen: Listen, path: str) -> tuple[int, int, int]:
    """Return the owner, group and mode that a new socket file will have.  Raises OSError."""
    folder = os.stat(os.path.dirname(path))
    user, group, mode = (listen.options.get(each) for each in ("user", "group", "mode"))
    uid = os.geteuid() if user is None else uid_of(listen.text, user)
    gid = folder.st_gid if folder.st_mode & stat.S_ISGID else os.getegid()
    gid = gid if group is None else gid_of(listen.text, group)
    umask = os.umask(0o022)
    os.umask(umask)
    return uid, gid, 0o777 & ~umask if mode is None else int(mode, 8)


def _give(sock: socket.socket, path: str, listen: Listen) -> os.stat_result:
    """Give a socket file to the user and group of the argument; return the file's stat()."""
    user, group = listen.options.get("user"), listen.options.get("group")
    uid = -1 if user is None else uid_of(listen.text, user)
    gid = -1 if group is None else gid_of(listen.text, group)
    return give(sock, path, uid, gid, give_away)


def give_away(fd: int, uid: int, gid: int) -> None:
    """Change the owner of a file by its O_PATH descriptor.  os.chown() would need /proc.

    Source: fchownat(2), AT_EMPTY_PATH.
    """
    call_libc("fchownat", fd, b"", uid, gid, _AT_EMPTY_PATH)
