"""Finds the default paths of control sockets (docs/control.md).

The protector, which makes the socket, and the programs that look for it use the same functions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from .socket_file import is_stale

SYSTEM = "/run/socketprotector"
#: The parents of logind's folders for logged-in users: pam_systemd(8).
_SESSIONS = ("/run/user/", "/var/run/user/")
SUFFIX = ".control"
#: The socket's name in an instance's own folder, which units and the init script make.
IN_OWN_FOLDER = "control"


def folders(environment: Mapping[str, str], user: int) -> list[str]:
    """Return the folders of control sockets; the first folder is for new sockets of this user.

    For root, the folder of a login session comes last: logind removes that folder at logout, even
    with files of root's services in it, and after `su` it belongs to another user.
    """
    own = environment.get("XDG_RUNTIME_DIR")
    if own is None or not os.path.isabs(own):
        return [SYSTEM]
    found = [os.path.join(own, "socketprotector"), SYSTEM]
    return found[::-1] if user == 0 and os.path.normpath(own).startswith(_SESSIONS) else found


def key_of(name: str) -> str:
    """Return a name as it is written in a path."""
    return name.replace("/", "_")


def apart(name: str, address: str) -> tuple[str, str]:
    """Return two longer names for an instance whose name other instances have, too.

    The first name adds the port or file of the instance's first address.  The second name, for use
    if the first is taken, adds the whole address.
    """
    whole = address.partition(":")[2]
    return f"{name}:{os.path.basename(address.rpartition(':')[2])}", f"{name}:{whole}"


def key(path: str) -> str:
    """Return the name in a control socket's path, in the form of key_of()."""
    folder, name = os.path.split(path)
    return os.path.basename(folder) if name == IN_OWN_FOLDER else name.removesuffix(SUFFIX)


def sockets(environment: Mapping[str, str], user: int) -> list[str]:
    """Return the paths of all control sockets in the folders, live or stale.

    Leaves out the sockets of stopped protectors that could not remove them (close_control() in
    unix_listener.py).
    """
    found = []
    for folder in folders(environment, user):
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        paths = [os.path.join(folder, name) for name in names]
        found += [path for path in paths if path.endswith(SUFFIX)]
        own = [os.path.join(path, IN_OWN_FOLDER) for path in paths if not path.endswith(SUFFIX)]
        found += [path for path in own if _may_exist(path)]
    return [path for path in found if not _has_ended(path)]


def _may_exist(path: str) -> bool:
    try:
        os.stat(path)
    except PermissionError:
        # Only root may look into the folder of a unit with DynamicUser=, which is a link.
        return os.path.islink(os.path.dirname(path))
    except OSError:
        return False
    return True


def _has_ended(path: str) -> bool:
    try:
        # A user who may not connect to such a file cannot see that no process listens there.
        marked = not os.lstat(path).st_mode & 0o444
        return marked and (not os.access(path, os.W_OK) or is_stale(path))
    except OSError:
        return False
