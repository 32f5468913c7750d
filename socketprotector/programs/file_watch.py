"""The watcher: says when files change.  For the development loop (--watch).

A process of its own, because what watches files is not to stay in the protector.  It lives as
long as its line, which is all that it knows of the protector.  Run as a script, on the standard
library and watchfiles alone:

    python file_watch.py LINE PATH... -- IGNORED...

LINE is the number of a SEQPACKET socket.  What it says there: `=` it watches; `+N PATH` so many
files have changed, one of them; `!WHY` it ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterable

from watchfiles import Change, DefaultFilter, watch

#: So long nothing may change before it is told: an editor, or git, writes many files in a row.
QUIET_MS = 200
#: Files that never stop changing are told of after that.
LONGEST_MS = 2000
#: The first time it returns without a change says that it watches by now.
_LOOK_MS = 250
_MOST_BYTES = 2000
#: What is there anew, told by the program before to itself.
_ANEW = "SOCKETPROTECTOR_WATCHED_ANEW"
Filter = Callable[[Change, str], bool]


def say(line: socket.socket, text: str) -> None:
    """Tell the protector; it may be gone, which is our end, too."""
    try:
        line.send(text.encode("utf-8", "backslashreplace")[:_MOST_BYTES])
    except OSError:
        os._exit(0)


class Below(DefaultFilter):
    """The files below a folder, without generated ones, and without these."""

    def __init__(self, ignored: Collection[str]) -> None:
        super().__init__()
        self._ignored = frozenset(ignored)

    def __call__(self, change: Change, path: str) -> bool:
        return path not in self._ignored and super().__call__(change, path)


def only(names: Iterable[str], folders: Collection[str]) -> Filter:
    """These very names, whatever they are; and folders that are there anew."""
    wanted = frozenset(names)
    return lambda change, path: path in wanted or (change is Change.added and path in folders)


def begin_anew(line: socket.socket, folder: str) -> None:
    """Look at another folder of the same name: what looks below it sees the one of before."""
    line.set_inheritable(True)
    os.execve(sys.executable, sys.orig_argv, {**os.environ, _ANEW: folder})


def look(
    line: socket.socket,
    paths: Iterable[str],
    wanted: Filter,
    began: threading.Event,
    recursive: bool,
    folders: Collection[str],
) -> None:
    """Tell of each change, for ever, or until one of the folders is there anew.

    began: set once it watches.
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
                    begin_anew(line, path)
            if changes:
                say(line, f"+{len(changes)} {min(path for _, path in changes)}")
    except BaseException as error:
        say(line, f"!{error}")
        os._exit(1)


def main() -> None:
    # It ends with its line only: a stop of the service ends the protector first.
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
    # What is replaced by another of its name: a file, a `current` link.
    names = [path for path in paths if os.path.islink(path) or not os.path.isdir(path)]
    # The folder, not the file: one that is replaced by another is not there any more.
    around = sorted({os.path.dirname(path) for path in paths})
    begun = []
    for there, wanted, recursive, looked_for in (
        (folders, Below(ignored), True, []),
        (around, only(names, folders), False, folders),
    ):
        if there:
            begun.append(threading.Event())
            given = (line, there, wanted, begun[-1], recursive, looked_for)
            threading.Thread(target=look, args=given, daemon=True).start()
    for began in begun:
        began.wait()
    say(line, "=")
    if anew := os.environ.pop(_ANEW, ""):
        say(line, f"+1 {anew}")
    while line.recv(1):
        pass
    os._exit(0)  # threads that wait for a change have nothing to finish


if __name__ == "__main__":
    main()
