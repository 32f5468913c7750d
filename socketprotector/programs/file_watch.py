"""The watcher: reports changed files to the protector, for development (--watch).

The watcher is a separate process, because watchfiles must not stay in the protector's memory.  It
exits when its line to the protector is closed.  It runs as a script, on the standard library and
watchfiles alone:

    python file_watch.py LINE PATH... -- IGNORED...

LINE is the descriptor of a SEQPACKET socket, for the watcher's messages:

    =         the watcher watches now
    +N PATH   N files have changed, one of them is PATH
    !WHY      the watcher exits
"""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Collection, Iterable

from watchfiles import Change, DefaultFilter, watch

#: Changes are reported after a pause of this length: an editor, or git, writes many files in a row.
QUIET_MS = 200
#: Changes without such a pause are reported after this time.
LONGEST_MS = 2000
#: watch() returns after this time without a change, which shows that it watches.
_LOOK_MS = 250
_MOST_BYTES = 2000
#: The variable with a replaced folder, for the watcher that is executed because of it.
_REPLACED = "SOCKETPROTECTOR_WATCHED_ANEW"
#: A file beside the path of a listener (system/socket_file.py), or beside the link `current`
#: (system/release_store.py), which is group 1.
_BESIDE = re.compile(
    r".*/\.[^/]+\.sp-(?:[0-9a-f]{6}~?|new)"
    r"|(.*)\.(?:lock|next|history(?:\.(?:next|unreadable)[^/]*)?)",
    re.DOTALL,
)
Filter = Callable[[Change, str], bool]


def say(line: socket.socket, text: str) -> None:
    """Send a message to the protector; exit if the protector has closed the line."""
    try:
        line.send(text.encode("utf-8", "backslashreplace")[:_MOST_BYTES])
    except OSError:
        os._exit(0)


class Below(DefaultFilter):
    """Selects the files below a folder, except generated and ignored ones."""

    def __init__(self, ignored: Collection[str]) -> None:
        super().__init__()
        self._ignored = frozenset(map(_real, ignored))

    def __call__(self, change: Change, path: str) -> bool:
        real = _real(path)
        found = _BESIDE.fullmatch(real)
        owner = found[1] if found else real  # None: a listener's file
        if owner is None or not self._ignored.isdisjoint((real, owner)) or _is_socket(path):
            return False
        return super().__call__(change, path)


def _real(path: str) -> str:
    """Return a path without links, except the last name: the watched folder may be a link."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _is_socket(path: str) -> bool:
    """Return whether a path is a socket, perhaps of a listener that a reload has added."""
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


def only(names: Iterable[str], folders: Collection[str]) -> Filter:
    """Return a filter for these names of files or links, and for replaced folders."""
    wanted = frozenset(names)
    return lambda change, path: path in wanted or (change is Change.added and path in folders)


def restart(line: socket.socket, folder: str) -> None:
    """Execute the watcher again: a folder was replaced, and watch() still watches the old one."""
    line.set_inheritable(True)
    os.execve(sys.executable, sys.orig_argv, {**os.environ, _REPLACED: folder})


def look(
    line: socket.socket,
    paths: Iterable[str],
    wanted: Filter,
    began: threading.Event,
    recursive: bool,
    folders: Collection[str],
) -> None:
    """Report each change to the protector; restart the watcher if one of the folders is replaced.

    began: set once this call watches.
    """
    try:
        for changes in watch(
            *paths,
            watch_filter=wanted,
            step=QUIET_MS,
            debounce=LONGEST_MS,
            recursive=recursive,
            rust_timeout=_LOOK_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
            ignore_permission_denied=True,
        ):
            began.set()
            for change, path in changes:
                if change is Change.added and path in folders:
                    restart(line, path)
            if changes:
                say(line, f"+{len(changes)} {min(path for _, path in changes)}")
    except BaseException as error:
        say(line, f"!{error}")
        os._exit(1)


def main() -> None:
    # Only the end of the line ends the watcher: at a stop the protector exits first.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    line = socket.socket(fileno=int(sys.argv[1]))
    line.set_inheritable(False)
    end = sys.argv.index("--")
    paths, ignored = sys.argv[2:end], sys.argv[end + 1 :]
    missing = [path for path in paths if not os.path.lexists(path)]
    if missing:
        say(line, f"!{missing[0]}: No such file or directory")
        os._exit(1)
    folders = [path for path in paths if os.path.isdir(path)]
    # Files and `current` links are often replaced, not changed.
    names = [path for path in paths if os.path.islink(path) or not os.path.isdir(path)]
    # So their folders are watched: a watch of a file ends when the file is replaced.
    parents = sorted({os.path.dirname(path) for path in paths})
    begun = []
    for watched, wanted, recursive, replaceable in (
        (folders, Below(ignored), True, []),
        (parents, only(names, folders), False, folders),
    ):
        if watched:
            begun.append(threading.Event())
            given = (line, watched, wanted, begun[-1], recursive, replaceable)
            threading.Thread(target=look, args=given, daemon=True).start()
    for began in begun:
        began.wait()
    say(line, "=")
    if replaced := os.environ.pop(_REPLACED, ""):
        say(line, f"+1 {replaced}")
    while line.recv(1):
        pass
    os._exit(0)  # threads that wait for a change have nothing to finish


if __name__ == "__main__":
    main()
