"""Which faults are tried: the sites of each operation, and what can happen at each."""

from __future__ import annotations

import errno
import json
import random
import re
import tempfile
import uuid
from pathlib import Path
from typing import Any

from tests import running
from tests.everycall.life import FILES_UNTIL_NEXT, KILL, OPERATIONS, Life, build
from tests.running import MARK

#: Trials that failed before the code was mended.  A site's line may have moved since.
MENDED = (
    ("rotation", "poll socketprotector/programs/guard.py", errno.ENOMEM),
    ("start", "pipe2 socketprotector/system/signals.py", errno.EMFILE),
)
#: What may be left or lost: a pattern of operation, site and fault; one of the problem; the reason.
EXCEPTIONS = (
    (
        r"\S+ (l?stat|unlink|rmdir|rename)\w* \S+ [A-Z]+",
        FILES_UNTIL_NEXT,
        "a file that cannot be looked at or removed stays; the next start replaces it",
    ),
    (
        r"\S+ \w+ \S+ SIGKILL",
        FILES_UNTIL_NEXT,
        "no process is left that removes files after a kill of the last one",
    ),
    (
        r"recovery \w+ socketprotector/programs/guard.py:\d+ SIGKILL",
        r"it does not serve|the next reload failed|\d+ connections lost",
        "the protector and its guard are both killed: the next start serves",
    ),
    (
        r"\S+ \w+ socketprotector_client/\S+ E[A-Z]+",
        r"a traceback: |1 connections lost",
        "a worker that cannot wait for its queue ends, with the connection that it has just taken; "
        "its traceback is its last words",
    ),
)
#: An operation, a site (CALL FILE:LINE), and an errno or KILL.
Trial = tuple[str, str, int]

SCARCE = "ENOMEM EMFILE ENFILE"
MEMORY = "ENOMEM ENOBUFS"
DISK = "ENOSPC EDQUOT EIO EROFS EACCES"
#: What surroundings can cause, by the call.  EINTR only where Linux gives it for such a call.
ERRNOS = {
    r"open(at)?(64)?": f"EINTR {SCARCE} {DISK}",
    r"read|pread(64)?": "EINTR",
    r"write|pwrite(64)?|writev": "EINTR",
    r"socket|socketpair|epoll_create1|pipe2|memfd_create|dup|inotify_init1": SCARCE,
    r"accept4?": f"EINTR {SCARCE} ENOBUFS EPERM",
    r"bind": "ENOMEM EACCES EROFS",
    r"listen": "ENOBUFS",
    r"connect": "EINTR EAGAIN EACCES",
    r"setsockopt": f"{MEMORY} EPERM",
    r"send(to|msg)?": f"EINTR EAGAIN {MEMORY} EPIPE ECONNRESET",
    r"recv(from|msg)?": f"EINTR EAGAIN {MEMORY} ECONNRESET",
    r"epoll_ctl": "ENOMEM ENOSPC",
    r"epoll_wait": "EINTR",
    r"poll": "EINTR ENOMEM",
    r"ftruncate(64)?": "EINTR ENOMEM",
    r"fork|posix_spawnp?": "EAGAIN ENOMEM",
    r"execve": "ENOMEM EACCES EIO",
    r"wait(id|pid|4)": "EINTR",
    r"pidfd_open": f"{SCARCE} ENOSYS",
    r"l?stat(64)?|fstatat(64)?": "ENOMEM EACCES EIO",
    r"unlink(at)?|rename(at)?|link|symlink|mkdir(at)?|rmdir": f"ENOMEM {DISK}",
    r"f?chmod(at)?|[fl]?chown": "EPERM EROFS EIO",
    r"flock": "EINTR ENOMEM",
    r"fsync|fdatasync": "EIO ENOSPC EDQUOT",
    r"inotify_add_watch": "ENOMEM ENOSPC",
    r"prctl|setrlimit|sched_setscheduler|setpriority": "EPERM",
}


#: Where CPython's signal handler writes to the pipe that wakes the loop: both ends are its own.
WAKES = ("write socketprotector/system/loop.py", "write socketprotector/programs/guard.py")


def errnos_of(site: str, kind: str) -> list[str]:
    """Return the errnos that a site can give; kind: what the descriptor is."""
    call = site.partition(" ")[0]
    if site.startswith(WAKES):
        return []
    names = next((each for key, each in ERRNOS.items() if re.fullmatch(key, call)), "").split()
    if call.startswith(("write", "pwrite")):
        names += DISK.replace(" EROFS EACCES", "").split() if kind.startswith("file") else []
        names += ["EPIPE"] if kind.startswith("pipe") else []
    if call.startswith(("read", "pread")):
        names += {"f": ["EIO"], "s": ["ECONNRESET"]}.get(kind[0], [])
    if call.startswith(("read", "write")) and "nonblock" in kind:
        names += ["EAGAIN"]
    if kind.startswith("file") and "EINTR" in names and not call.startswith("open"):
        names.remove("EINTR")  # a disk is waited for without it
    return names


def _life(folder: Path, operation: str, plan: str) -> Life:
    library = folder / "faults.so"
    if not library.exists():
        build(folder)
    value = uuid.uuid4().hex
    running._before[value] = running._processes()
    place = Path(tempfile.mkdtemp(prefix="life-", dir=folder))
    return Life(place, library, OPERATIONS[operation], plan, {MARK: value})


def found_sites(folder: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """Return the sites of each operation, each with its descriptor's kind; keep them in a file."""
    kept = folder / "sites.json"
    sites: dict[str, dict[str, str]] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in names or OPERATIONS:
        if name in sites:
            continue
        life = _life(folder, name, "")
        problems = life.live()
        assert not problems, f"{name} without a fault: {problems}\n{life.log}"
        lines = (life.folder / "sites").read_text().splitlines()
        sites[name] = dict(line.rsplit(" ", 1) for line in sorted(lines))
        life.forget()
        kept.write_text(json.dumps(sites, indent=1))
    return {name: sites[name] for name in names or OPERATIONS}


def trials(sites: dict[str, dict[str, str]], seed: int = 36) -> list[Trial]:
    """Return all trials, in a fixed order in which the operations take turns."""
    drawn = random.Random(seed)
    by_operation = []
    for name, found in sites.items():
        each = [
            (name, site, code)
            for site, kind in found.items()
            for code in (KILL, *(getattr(errno, e) for e in errnos_of(site, kind)))
        ]
        drawn.shuffle(each)
        by_operation.append(each)
    turns = max(map(len, by_operation), default=0)
    return [each[at] for at in range(turns) for each in by_operation if at < len(each)]


def excuse(name: str, site: str, code: int, problem: str) -> str:
    """Return why this may be so; "": it may not."""
    fault = f"{name} {site} {errno.errorcode.get(code, 'SIGKILL')}"
    found = (
        reason
        for where, what, reason in EXCEPTIONS
        if re.fullmatch(where, fault) and re.match(what, problem)
    )
    return next(found, "")


def try_one(folder: Path, trial: Trial) -> dict[str, Any]:
    """Live once with a fault; return what came of it."""
    name, site, code = trial
    life = _life(folder, name, f"{site} {code}")
    try:
        problems = life.live()
    except Exception as error:
        problems = [repr(error)]
        life._end()
    fired = life.fired
    excused = [each for each in problems if excuse(name, site, code, each)]
    problems = [each for each in problems if each not in excused]
    if not problems:
        life.forget()
    return {
        "trial": trial,
        "name": errno.errorcode.get(code, "SIGKILL"),
        "fired": fired,
        "problems": problems,
        "excused": excused,
        "folder": str(life.folder),
    }


def report(sites: dict[str, dict[str, str]], results: Path) -> str:
    """Return how many sites and faults there are, and what came of them."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    there = {(name, site) for name, found in sites.items() for site in found}
    tried = {tuple(each["trial"][:2]) for each in lines}
    missed = sum(not each["fired"] for each in lines)
    failed = sum(bool(each["problems"]) for each in lines)
    excused = sum(bool(each["excused"]) for each in lines)
    return (
        f"{len(there)} sites in {len(sites)} operations, {len(tried & there)} tried; "
        f"{len(trials(sites))} faults, {len(lines)} tried, {missed} of these not reached; "
        f"{failed} failed, {excused} are exceptions with a reason"
    )
