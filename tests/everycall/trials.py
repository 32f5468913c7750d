"""Which faults are tried: the sites of each operation, and what can happen at each."""

from __future__ import annotations

import errno
import json
import random
import re
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests import running
from tests.everycall.life import FILES_UNTIL_NEXT, KILL, OPERATIONS, Life, build
from tests.running import MARK

#: Trials that failed before the code was fixed.  A site's line may have moved since.
FIXED = (
    ("rotation", "poll socketprotector/programs/guard.py", errno.ENOMEM),
    ("start", "pipe2 socketprotector/system/signals.py", errno.EMFILE),
    ("reload", "epoll_add socketprotector_client/wait_set.py", errno.ENOSPC),
    ("recovery", "pipe2 socketprotector/system/signals.py", errno.ENOMEM),
)
#: What may be left or lost: a pattern of operation, site and fault; one of the problem; the reason.
EXCEPTIONS = (
    (
        r"\S+ (l?stat|unlink|rmdir|rename)\w* \S+ [A-Z]+",
        FILES_UNTIL_NEXT,
        "a file that cannot be looked at or removed stays; the next start replaces it",
    ),
    (
        r"\S+ \w+ \S+ SIGKILL( of the guard)?",
        FILES_UNTIL_NEXT,
        "no process is left that removes files after a kill of the last one",
    ),
    (
        r"(listener-)?recovery \w+ \S+ SIGKILL of the guard",
        r"it does not serve|the next reload failed|\d+ connections lost",
        "the protector and its guard are both killed: the next start serves",
    ),
    (
        r"\S+ \w+ socketprotector_client/\S+ E[A-Z]+",
        r"(?s)a traceback: .* in (open_intake|__enter__|share|ready)\n",
        "a worker that cannot begin to take connections ends; its traceback is its last words",
    ),
    (
        r"\S+ write socketprotector/system/log.py:\d+ E[A-Z]+",
        r"the log has no line .*dropped_lines=1",
        "this line could not be written, and the next one counts it",
    ),
    (
        r"start \w+ socketprotector/launch/pid_file.py:\d+ SIGKILL",
        r"files are left: \['pid\.\d+'\]",
        "the name has the pid of the start: a fixed name could be another program's file",
    ),
    (
        r"\S+ (recv|send) socketprotector_client/serving.py:\d+ E[A-Z]+",
        r"(?s)a traceback: .* in answer\n|1 connections lost",
        "the worker's own handler failed, and the library prints where",
    ),
)
#: An operation, a site (CALL FILE:LINE), and an errno or KILL.
Trial = tuple[str, str, int]

SCARCE = "ENOMEM EMFILE ENFILE"
DISK = "ENOSPC EDQUOT EIO EROFS EACCES"
#: What surroundings can cause, by call, kind (see faults.c) and file; the first match counts.
#: Sources: the manual page of each call, and the kernel's code where that says more or less.
ERRNOS = (
    # /proc, /sys and /dev are in memory, but hidepid and a user may forbid them.
    (r"open\w* kernel", f"{SCARCE} EACCES"),
    (r"(l?stat\w*|readlink) kernel", "ENOMEM EACCES"),
    # EINTR: a file system in user space.  What exists is opened without new blocks.
    (r"open\w* create", f"EINTR {SCARCE} {DISK}"),
    (r"open\w* write", f"EINTR {SCARCE} EIO EROFS EACCES"),
    (r"open\w* read", f"EINTR {SCARCE} EIO EACCES"),
    # A file is read and written without EINTR.  A memfd is read without a disk, and written in
    # pages that are new; so is a pipe.
    (r"p?read\w* file", "EIO"),
    (r"p?read\w* kernel", "ENOMEM"),
    (r"p?read\w* (unix|tcp)", "EINTR EAGAIN ECONNRESET"),
    (r"p?read\w* pipe", "EINTR"),  # it has one reader, which has seen that there is something
    (r"p?read\w* other", "EINTR EAGAIN"),
    (r"p?write\w* file", "ENOSPC EDQUOT EIO"),
    (r"p?write\w* memory", "ENOMEM ENOSPC"),
    (r"p?write\w* pipe", "EINTR EAGAIN ENOMEM EPIPE"),
    (r"p?write\w* (unix|tcp)", "EINTR EAGAIN ENOBUFS EPIPE ECONNRESET"),
    (r"p?write\w* other", "EINTR EAGAIN"),
    (r"(socket|socketpair|epoll_create1|pipe2|memfd_create|inotify_init1) ", SCARCE),
    (r"dup ", "ENOMEM EMFILE"),  # of an open file: only the process's table grows
    (r"accept4? ", f"EINTR EAGAIN {SCARCE} ENOBUFS EPERM"),
    (r"bind (unix|datagram)", f"ENOMEM {DISK}"),
    (r"bind ", "ENOMEM EACCES"),
    (r"listen ", "ENOMEM"),  # the group of SO_REUSEPORT
    # A TCP socket connects on after EINTR, which no failure without a call can show.
    (r"connect unix", "EINTR EAGAIN ENOMEM EACCES"),
    (r"connect datagram", "ENOMEM EACCES"),
    (r"connect tcp", "EAGAIN ENOBUFS EACCES"),
    (r"setsockopt option-1-(26|50|51|52)", "ENOMEM EPERM"),  # filters and programs
    (r"setsockopt option-1-(25|32|33|36|62)", "EPERM"),  # devices, marks, *FORCE
    (r"send\w* (unix|datagram)", "EINTR EAGAIN ENOMEM ENOBUFS EPIPE ECONNRESET"),
    (r"send\w* tcp", "EINTR EAGAIN ENOBUFS EPIPE ECONNRESET"),
    (r"(send|recv)\w* netlink", "EINTR EAGAIN ENOMEM ENOBUFS"),
    # The queue's end is reset only if a worker sent something, which SHUT_RD prevents.
    (r"recvmsg unix\S* \S+/(channel|worker_protocol)\.py", "EAGAIN"),
    (r"recv\w* (unix|tcp)", "EINTR EAGAIN ECONNRESET"),  # into memory that is there
    (r"recv\w* datagram", "EINTR EAGAIN"),
    (r"epoll_add ", "ENOMEM ENOSPC"),  # other changes allocate nothing
    (r"epoll_wait ", "EINTR"),
    (r"poll few", "EINTR"),  # the kernel's stack has room for nine waits, of which a file takes two
    (r"poll many", "EINTR ENOMEM"),
    (r"ftruncate\w* file", "EIO EROFS"),  # a memfd grows without a page
    (r"(fork|posix_spawnp?) ", "EAGAIN ENOMEM"),
    (r"execve ", "ENOMEM ENFILE EACCES EIO"),
    (r"wait(id|pid|4) ", "EINTR"),
    (r"pidfd_open ", f"{SCARCE} ENOSYS"),
    (r"(l?stat\w*|fstatat\w*|readlink) ", "ENOMEM EACCES EIO"),
    # Some file systems write new blocks to remove a name.
    (r"(unlink|rename|link|symlink|mkdir|rmdir)\w* ", f"ENOMEM {DISK}"),
    (r"fchmod pipe", ""),
    (r"(f?chmod(at)?|[fl]?chown) ", "EPERM EROFS EIO"),
    (r"flock ", "EINTR ENOMEM"),
    (r"(fsync|fdatasync) ", "EIO ENOSPC EDQUOT"),
    (r"inotify_add_watch ", "ENOMEM ENOSPC EACCES"),
    (r"(prctl|setrlimit|sched_setscheduler|setpriority) ", "EPERM"),
)


#: Calls that give EAGAIN only on a descriptor that does not wait.
_WAITS = re.compile("p?read|p?write|send|recv|accept|connect (unix|datagram)")


def errnos_of(site: str, kind: str) -> list[str]:
    """Return the errnos that a site can give; kind: what the descriptor is."""
    name, _, place = site.partition(" ")
    call = f"{name} {kind} {place}"
    names = next((names for key, names in ERRNOS if re.match(key, call)), "").split()
    # EINTR ends only a blocking call, and EAGAIN comes only from a nonblocking call.
    never = "EINTR" if kind.endswith("+nonblock") else "EAGAIN" if _WAITS.match(call) else ""
    return [name for name in names if name != never]


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
    sites: dict[str, dict[str, str]] = {}
    with suppress(FileNotFoundError, json.JSONDecodeError):
        sites = json.loads(kept.read_text())
    for name in names or OPERATIONS:
        if name in sites:
            continue
        life = _life(folder, name, "")
        try:
            problems = life.live()
        except BaseException:
            life._end()
            life.forget()
            raise
        assert not problems, f"{name} without a fault: {problems}\n{life.log}"
        lines = (life.folder / "sites").read_text().splitlines()
        sites[name] = dict(line.rsplit(" ", 1) for line in sorted(lines))
        life.forget()
        written = kept.with_suffix(".new")
        written.write_text(json.dumps(sites, indent=1))
        written.replace(kept)
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


def excuse(name: str, site: str, code: int, problem: str, *, in_guard: bool) -> str:
    """Return why this may be so; "": it may not."""
    fault = f"{name} {site} {errno.errorcode.get(code, 'SIGKILL')}"
    if in_guard:
        fault += " of the guard"
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
    in_guard = life.fired_in_guard
    excused = [each for each in problems if excuse(name, site, code, each, in_guard=in_guard)]
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


def kept_outcomes(results: Path) -> list[dict[str, Any]]:
    """Return the kept outcomes, without a line that a killed run left incomplete."""
    found = []
    for line in results.read_text().splitlines() if results.exists() else []:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def report(sites: dict[str, dict[str, str]], results: Path) -> str:
    """Return how many sites and faults there are, and what came of them."""
    lines = kept_outcomes(results)
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
