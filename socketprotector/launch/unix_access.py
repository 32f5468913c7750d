"""Warns if fewer users can connect to a UNIX socket than the operator may expect.

connect(2) needs write permission for the socket file, and search permission for each folder on its
path.  A proxy usually runs as another user; if the proxy cannot connect, it answers 502.

Source: unix(7), path_resolution(7), acl(5).
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress

from ..model.lazy_dataclass import frozen
from ..model.settings import ListenerSettings
from .bind_unix import rights_of_new
from .listen_spec import Listen
from .user_access import downwards

_ACCESS_ACL = "system.posix_acl_access"
_DEFAULT_ACL = "system.posix_acl_default"


@frozen
class _Clients:
    """The users whom a socket's mode admits: a user, a group, or (without either) every user."""

    uid: int | None = None
    gids: Collection[int] = ()
    text: str = "every user"

    def can_enter(self, folder: os.stat_result) -> bool:
        """Return whether these users can enter a folder, judged by its mode."""
        if self.uid == 0:
            return True
        if self.uid == folder.st_uid:
            return bool(folder.st_mode & stat.S_IXUSR)
        needed = stat.S_IXGRP if folder.st_gid in self.gids else stat.S_IXOTH
        return bool(folder.st_mode & needed)


def notices(listens: Sequence[Listen], listeners: Iterable[ListenerSettings]) -> Iterator[str]:
    """Yield a line for each socket file to which a proxy's user probably cannot connect.

    listeners: bound listeners; with --check also listeners that are not bound (their inode is 0).
    """
    by_text = {each.text: each for each in listens}
    for each in listeners:
        listen, path = by_text.get(each.text), each.address.removeprefix("unix:")
        if listen is None or each.foreign or each.removed or not path.startswith("/"):
            continue
        with suppress(OSError):
            if problem := _notice(listen, path, is_bound=each.inode != 0):
                yield f"unix:{path}: {problem}"


def _notice(listen: Listen, path: str, *, is_bound: bool) -> str:
    """Return what is wrong with the access to one socket; "" if nothing is.  Raises OSError."""
    folder = os.path.dirname(path)
    if is_bound:
        found = os.lstat(path)
        uid, gid, mode = found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)
    else:
        uid, gid, mode = rights_of_new(listen, path)
    if _has_acl(path, _ACCESS_ACL) if is_bound else _has_acl(folder, _DEFAULT_ACL):
        return ""
    if mode & stat.S_IWOTH:
        return _closed(folder, _Clients())
    options = listen.options
    inherited = bool(os.stat(folder).st_mode & stat.S_ISGID)
    if mode & stat.S_IWGRP and ("group" in options or inherited or ("mode" in options and gid)):
        return _closed(folder, _Clients(gids=(gid,), text=f"group {_group(gid)}"))
    if "mode" in options and not mode & 0o077:
        return ""
    if "user" in options and not {"mode", "group"} & options.keys():
        return _closed(folder, _Clients(uid, _groups_of(uid), f"user {_user(uid)}"))
    return _only_owner(listen, uid, gid, mode)


def _only_owner(listen: Listen, uid: int, gid: int, mode: int) -> str:
    """Return a notice that only the socket's owner, and perhaps its group, can connect."""
    who = f"user {_user(uid)}"
    if mode & stat.S_IWGRP:
        who = f"{who} and group {_group(gid)}"
    options = {"group": "GROUP", **listen.options, "mode": "0660"}
    query = "&".join(f"{name}={value}" for name, value in sorted(options.items(), reverse=True))
    rights = stat.filemode(stat.S_IFSOCK | mode)
    return (
        f"only {who} can connect ({rights} {_user(uid)} {_group(gid)}); for a proxy of another "
        f"user write '{listen.text.partition('?')[0]}?{query}', with the proxy's group"
    )


def _closed(folder: str, clients: _Clients) -> str:
    """Return a notice if users whom the socket's mode admits cannot enter a folder on its path."""
    parts = dict.fromkeys((*downwards(folder), *downwards(os.path.realpath(folder))))
    for part in parts:
        found = os.stat(part)
        if not clients.can_enter(found) and not _has_acl(part, _ACCESS_ACL):
            rights = f"{stat.filemode(found.st_mode)} {_user(found.st_uid)} {_group(found.st_gid)}"
            return (
                f"its mode admits {clients.text}, but the folder {part} does not ({rights}); "
                f"open that folder (chmod +x), or choose another one"
            )
    return ""


def _has_acl(path: str, name: str) -> bool:
    try:
        os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return False
    return True


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _groups_of(uid: int) -> Collection[int]:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return ()
    return os.getgrouplist(user.pw_name, user.pw_gid)
