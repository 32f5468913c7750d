"""Runs local_user.py as a user of no group of ours, on what an instance has made."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.hostile import local_user
from tests.hostile.attacked import Attacked
from tests.namespaces import STRANGER, any_users_python
from tests.own_folder import let_through
from tests.procfs import descriptors

#: Folders of the kernel, in which an instance makes nothing.
_SYSTEM = ("dev", "proc", "sys")
LOOKS = {"read", "list", "lock"}
#: The whole of what this user may do, by the kind of file.
MAY = {
    "folder": LOOKS,
    "pid": {"read"},  # its lock is held
    "s": {"connect"},  # the service
    "notify": set[str](),
    "process": set[str](),
}


def own_folder(folder: Path) -> Path:
    """Make a folder of the stranger's, which it can reach."""
    let_through(folder)
    made = folder / "own"
    made.mkdir()
    os.chown(made, STRANGER, STRANGER)
    return made


@contextmanager
def tried(paths: Iterable[Path], pids: list[int], own: Path) -> Iterator[set[tuple[str, str]]]:
    """Yield what a stranger achieves, while it holds what it has opened."""
    given = ([*map(str, paths)], pids, abstract_names(pids))
    words = (*map(json.dumps, given), str(own))
    with subprocess.Popen(
        [any_users_python()[0], "-I", local_user.__file__, *words],
        user=STRANGER,
        group=STRANGER,
        extra_groups=[],
        start_new_session=True,  # within one, any user may send CONT
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
    ) as process:
        assert process.stdout is not None
        try:
            yield {(act, str(each)) for act, each in json.loads(process.stdout.readline())}
        finally:
            process.kill()


def abstract_names(pids: list[int]) -> list[str]:
    """Return the names of these processes' abstract sockets; other tests have some, too."""
    held = {target for pid in pids for target in descriptors(pid).values()}
    lines = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [words for words in map(str.split, lines) if words[-1].startswith("@")]
    return [name for *_, inode, name in rows if f"socket:[{inode}]" in held]


def made_by(one: Attacked, *others: int) -> list[Path]:
    """Return each path that the instance has made or has open, but what lies in secret folders.

    others: processes that have made some, too.
    """
    folders = (one.start.folder, one.control.parent)
    found = {each for folder in folders for each in (folder, *folder.rglob("*"))}
    for pid in (*one.processes(), *others):
        held = {Path(target) for target in descriptors(pid).values() if target.startswith("/")}
        found |= {each for each in held if each.parts[1] not in _SYSTEM and each.exists()}
    found.discard(one.release.path)  # the test's
    return sorted(path for path in found if not path.parent.name.startswith(".notify-"))


def too_much(done: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return what it has done and may not do."""
    return {(act, path) for act, path in done if act not in MAY.get(_kind_of(path), set())}


def _kind_of(path: str) -> str:
    name = os.path.basename(path)
    if not os.path.isabs(path):
        return "process"
    if name.startswith(".notify-"):
        return "notify"
    return "folder" if os.path.isdir(path) else name
