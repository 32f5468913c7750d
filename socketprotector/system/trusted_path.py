"""Finds out whether only trusted users decide to which file a path leads.

Source: path_resolution(7), symlink(7).
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Collection

_LINKS = 40


def only_lead(path: str, owners: Collection[int], *, in_shared: bool = False) -> bool:
    """Return whether only these users can change the file to which a path leads.

    A missing file counts as theirs if only they can make it.
    in_shared: also accept a folder in which every user may rename files, such as an emptyDir.
    """
    here, shared, links = "/" if path.startswith("/") else os.getcwd(), False, 0
    names = deque(path.split("/"))
    while names:
        name = names.popleft()
        if name in ("", "."):
            continue
        there = os.path.normpath(os.path.join(here, name))
        try:
            found = os.lstat(there)
        except FileNotFoundError:
            return not names and not shared  # the file will be made
        if found.st_uid not in owners:
            return False
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _LINKS:
                return False
            target = os.readlink(there)
            names.extendleft(reversed(target.split("/")))
            here = "/" if target.startswith("/") else here
            continue
        shared = bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        sticky = found.st_mode & stat.S_ISVTX
        if stat.S_ISDIR(found.st_mode) and shared and not sticky and not in_shared:
            return False
        here = there
    return True
