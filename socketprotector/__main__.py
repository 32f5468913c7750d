"""`SocketProtector` and `python -m socketprotector`: programs behind one name.

Without inherited descriptors of ours this is the command line.  With them it is the resident
process, or the process that reads a configuration again for it.  The resident process must not load
modules that only the command line needs.  `demo` as the first word, which is no LISTEN, is the
demo; a shell that completes a line names itself in a variable.
"""

from __future__ import annotations

import gc
import os
import signal
import sys

from .model.errors import lack_of_memory
from .system import inherited, late_stdlib
from .system.terminal import keep_exit_status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .launch.rights import Rights

_STDERR = 2
_SYSTEM_REFUSED = 111  # errors.SystemRefused's
_INTERRUPTED = 130


def _loaded() -> None:
    """Collect garbage from now on, and only among objects that are made from now on."""
    gc.freeze()
    gc.enable()


def main() -> None:
    """Run the program that was chosen, and exit with its status."""
    keep_exit_status()
    try:
        _run()
    except (MemoryError, ImportError) as error:  # `ulimit -v`
        lack = lack_of_memory(error)
        if not lack:
            raise  # the installation is incomplete
        os.write(_STDERR, f"SocketProtector: {lack}\n".encode())
        os._exit(_SYSTEM_REFUSED)
    except KeyboardInterrupt:  # while the command line's modules are loaded
        os._exit(_INTERRUPTED)


def _keep_rights() -> None:
    """Do nothing: this process is not root, so it can have no other rights."""


def _read_rights(words: Sequence[str]) -> Rights:
    from .launch import cli

    return cli.rights_of(words)


def _run() -> None:
    # What is imported stays: to look for garbage among it took a quarter of a start, and most of
    # the end.
    gc.disable()
    resumes, reads = inherited.is_ours(), inherited.is_for_reader()
    take_rights = _keep_rights
    if (resumes or reads) and os.geteuid() == 0:
        from .launch import rights

        take_rights = rights.keep_or_read(sys.argv[1:], _read_rights)
    if reads:
        from .launch import reload_child

        _loaded()
        take_rights()
        sys.exit(reload_child.main())
    if resumes:
        for name in (*late_stdlib.UNUSED, "re"):
            late_stdlib.defer(name)
        # Until its handlers stand a signal waits: it would end this program, and its workers go
        # on alone. The others who execute us have blocked them; systemd blocks nothing.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        from .system import late_modules

        try:
            late_modules.keep()
        except OSError as error:
            os.write(_STDERR, f"SocketProtector: cannot keep its code: {error}\n".encode())
            os._exit(_SYSTEM_REFUSED)
        from .daemon import resident

        # The names of all files beside the loaded modules: 0.1 MB that nothing needs again.
        sys.path_importer_cache.clear()
        _loaded()
        take_rights()
        resident.main()
    elif sys.argv[1:2] == ["demo"]:
        # What it loads first takes a moment, and can be cut off without a trace of it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
        from .demo import cli as demo

        _loaded()
        sys.exit(demo.main(sys.argv[2:]))
    elif "_SOCKETPROTECTOR_COMPLETE" in os.environ:
        from .demo.cli import command
        from .launch import completion

        sys.exit(completion.main(command))
    else:
        from .launch import cli

        _loaded()
        sys.exit(cli.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
