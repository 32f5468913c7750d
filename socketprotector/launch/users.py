"""Looks up the users and groups that options name.  An unknown name raises UsageError."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Mapping

from ..model.errors import UsageError
from ..model.settings import Identity
from ..model.text import shortened, whole

#: (uid_t)-1 means no user.
MOST_ID = 2**32 - 2


def identity(user: str | None, group: str | None, *, again: bool = False) -> Identity | None:
    """Look up --user and --group; None if neither is given.

    again: at a reload.  Then root is not required: this process may already run as that user.
    """
    if user is None and group is None:
        return None
    entry = _user("--user", str(os.getuid()) if user is None else user)
    gid = entry.pw_gid if group is None else gid_of("--group", group)
    if os.geteuid() != 0 and not again:
        raise UsageError("--user and --group need root; leave them out or start as root")
    return _identity(entry, gid)


def worker_identity(worker_user: str | None, user: str | None) -> Identity | None:
    """Look up --worker-user; None when it is not given."""
    if worker_user is None:
        return None
    if user is None:
        raise UsageError("--worker-user needs --user, which the protector itself runs as")
    entry = _user("--worker-user", worker_user)
    return _identity(entry, entry.pw_gid)


def refuse_root_unless_named(user: str | None, file: str | None) -> None:
    """Refuse to run as root unless --user says so.  file: the configuration file, if any."""
    if user is None and os.geteuid() == 0:
        wanted = f'write user = "NAME" in {file}, or' if file else "give --user NAME, or --user"
        root = 'user = "root"' if file else "root"
        raise UsageError(f"no user, so everything would run as root: {wanted} {root} if intended")


def gid_of(option: str, name: str) -> int:
    """Return a group's number.  option: the option's name.  name: the group's name or number."""
    try:
        number = whole(name, MOST_ID)
        return (grp.getgrnam(name) if number is None else grp.getgrgid(number)).gr_gid
    except KeyError:
        raise UsageError(f"{option} {shortened(name)}: unknown group; see getent group") from None


def uid_of(option: str, name: str) -> int:
    """Return a user's number.  option: the option that names the user."""
    return _user(option, name).pw_uid


def status_group(environment: Mapping[str, str]) -> int | None:
    """Return the default for --status-group: the group in SOCKETPROTECTOR_STATUS_GROUP.

    Our systemd units set this variable, and our packages make the group.  None: the variable is not
    set, or there is no such group.
    """
    try:
        return grp.getgrnam(environment.get("SOCKETPROTECTOR_STATUS_GROUP", "")).gr_gid
    except KeyError:
        return None


def _user(option: str, name: str) -> pwd.struct_passwd:
    try:
        number = whole(name, MOST_ID)
        return pwd.getpwnam(name) if number is None else pwd.getpwuid(number)
    except KeyError:
        raise UsageError(f"{option} {shortened(name)}: unknown user; see getent passwd") from None


def _identity(entry: pwd.struct_passwd, gid: int) -> Identity:
    name = entry.pw_name
    groups = tuple(os.getgrouplist(name, gid))
    return Identity(name, entry.pw_uid, gid, groups, entry.pw_dir, entry.pw_shell)
