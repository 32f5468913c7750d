"""The default path of control sockets (docs/control.md).

Shared by the protector that creates one and the programs that look for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

SYSTEM = "/run/socketprotector"
#: Where logind has a folder for each user who is logged in: pam_systemd(8).
_SESSIONS = ("/run/user/", "/var/run/user/")
SUFFIX = ".control"
#: In an instance's own folder, as units and the init script make one for each.
IN_OWN_FOLDER = "control"


def folders(environment: Mapping[str, str], user: int) -> list[str]:
    """Return where control sockets are, the one where this user makes new ones first.

    A folder in which logind keeps a session's files is removed at logout, with all that a service
    of root's would have there; and after `su` it is somebody else's.
    """
    own = environment.get("XDG_RUNTIME_DIR")
    if own is None or not os.path.isabs(own):
        return [SYSTEM]
    found = [os.path.join(own, "socketprotector"), SYSTEM]
    return found[::-1] if user == 0 and os.path.normpath(own).startswith(_SESSIONS) else found


def key_of(name: str) -> str:
    """Return what stands for a name in a path."""
    return name.replace("/", "_")


def apart(name: str, address: str) -> tuple[str, str]:
    """Return what one of several of a name is called, by its first listener's address.

    By its port or file; and where another one has the same in another place, by all of it.
    """
    whole = address.partition(":")[2]
    return f"{name}:{os.path.basename(address.rpartition(':')[2])}", f"{name}:{whole}"


def key(path: str) -> str:
    """Return what a control socket's name was made from."""
    folder, name = os.path.split(path)
    return os.path.basename(folder) if name == IN_OWN_FOLDER else name.removesuffix(SUFFIX)


def sockets(environment: Mapping[str, str], user: int) -> list[str]:
    """Return the paths of all control sockets in the folders, living or dead."""
    found = []
    for folder in folders(environment, user):
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        paths = [os.path.join(folder, name) for name in names]
        found += [path for path in paths if path.endswith(SUFFIX)]
        own = [os.path.join(path, IN_OWN_FOLDER) for path in paths if not path.endswith(SUFFIX)]
        found += [path for path in own if os.path.exists(path)]
    return found
