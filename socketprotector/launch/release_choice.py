"""Chooses the release to start, and refuses options that do not fit --releases.

The launching process and a reload take the release that `current`, the link of --current, names.
A deploy takes the release that its request names.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..model.errors import UsageError
from ..model.lazy_dataclass import frozen
from ..model.release import PLACEHOLDER
from ..model.settings import Identity
from ..system import release_store
from . import user_access, users

#: How many links Linux follows in one path.
_MOST_LINKS = 40
_HOW = f"use {PLACEHOLDER}, which is the release's own path"


@frozen
class Chosen:
    """The release to start; both fields are "" without --releases."""

    name: str = ""
    path: str = ""


def check_options(
    given: Mapping[str, Any], releases: str | None, current: str | None, words: tuple[str, ...]
) -> None:
    """Refuse --releases, --current or --deployer without the options that they need.

    given: the options' values.  words: the command.
    """
    if bool(releases) != bool(current):
        option, missing = ("releases", "current") if releases else ("current", "releases")
        raise UsageError(f"--{option} needs --{missing}")
    if given["deployer"] and not releases:
        raise UsageError("--deployer needs --releases and --current")
    if releases and not any(PLACEHOLDER in each for each in (*words, given["chdir"] or "")):
        raise UsageError(
            f"--releases: neither the command nor --chdir has {PLACEHOLDER}, so a deploy would "
            "change nothing"
        )


def check_files(releases: str, current: str, files: Mapping[str, str | None]) -> None:
    """Refuse a file that a deploy would change, or whose path leads through the link `current`.

    files: the files that options name, by option.  A path with {release} is allowed, because the
    operator wants a file of the release.
    """
    real = os.path.join(os.path.realpath(releases), "")
    if os.path.join(os.path.realpath(os.path.dirname(current)), "").startswith(real):
        raise UsageError(f"--current {current} is inside --releases; choose another folder")
    for option, path in files.items():
        if not path or PLACEHOLDER in path:
            continue
        if _goes_through(os.path.join(path, "x") if option == "--chdir" else path, current):
            raise UsageError(f"{option} {path} leads through {current}; {_HOW}")
        if option == "--config" and os.path.realpath(path).startswith(real):
            raise UsageError(
                f"--config {path} is inside {releases}, so a release would change it; move it out"
            )


def _goes_through(path: str, current: str) -> bool:
    """Return True if a path leads through the link `current`, also by way of other links."""
    current_link = os.path.realpath(os.path.dirname(current)), os.path.basename(current)
    folder, names, followed = "/", path.split("/")[::-1], 0
    while names:
        name = names.pop()
        step = os.path.join(folder, name)
        if names and (folder, name) == current_link:
            return True
        if name == "..":
            folder = os.path.dirname(folder)
        elif not os.path.islink(step):
            folder = step if name not in ("", ".") else folder
        elif (followed := followed + 1) > _MOST_LINKS:
            return False  # a loop of links; opening the file will report it
        else:
            target = os.readlink(step)
            folder = "/" if target.startswith("/") else folder
            names += target.split("/")[::-1]
    return False


def choose(
    releases: str,
    current: str,
    wanted: str,
    deployer: str | None,
    identity: Identity | None,
    worker_identity: Identity | None,
) -> Chosen:
    """Return the release to start.  Raises UsageError.

    wanted: the name of the release; "" for the release that `current` names.
    """
    try:
        name = wanted or release_store.named(current, releases)
        accepted = owners(deployer, identity, worker_identity)
        return Chosen(name, release_store.check(releases, name, accepted))
    except release_store.ReleaseError as error:
        raise UsageError(str(error)) from error


def owners(
    deployer: str | None, identity: Identity | None, worker_identity: Identity | None
) -> frozenset[int]:
    """Return the uids whose releases may be started."""
    found = {0} | ({users.uid_of("--deployer", deployer)} if deployer else set())
    own = identity.uid if identity else os.geteuid()
    workers = worker_identity.uid if worker_identity else own
    without_root = identity is None and own != 0
    # Workers must not be able to make the next release, unless everything runs as one user anyway.
    return frozenset(found | ({own} if own != workers or without_root else set()))


def absolute(folder: str, path: str) -> str:
    """Return an absolute path, resolved from a folder; a path that begins with {release} stays."""
    return path if path.startswith(PLACEHOLDER) else os.path.join(folder, path)


def refuse_unmovable(current: str, identity: Identity | None) -> None:
    """Refuse a folder in which the protector cannot move `current`.

    This check is for a start, where root can become the protector's user.  At a deploy, prepare()
    of daemon/current_link.py makes the link as that user.  A plain reload moves no link.
    """
    closed = partial(_closed, os.path.dirname(current))
    found = user_access.as_user(identity, closed) if identity else closed()
    if found:
        who = f"user {identity.user}" if identity else "this user"
        raise UsageError(
            f"--current {current}: {who} cannot move it: {found}; give it a folder of its own, "
            "which that user may write"
        )


def _closed(folder: str) -> str:
    try:
        user_access.refuse_unwritable(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


def refuse_shared(current: str) -> None:
    """Refuse a folder in which other users could replace `current` or the files beside it.

    This check reads only the folder's mode, so its result is the same for each user.
    """
    folder = os.path.dirname(current)
    try:
        mode = os.stat(folder).st_mode
    except OSError as error:
        raise UsageError(f"--current {current}: {folder}: {error.strerror}") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(
            f"--current {current}: other users can write {folder} ({stat.filemode(mode)}); chmod "
            f"go-w {folder}"
        )
