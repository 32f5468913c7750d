"""`SocketProtector` and `python -m socketprotector`: programs behind one name.

Without our descriptors at the door this is the command line; with them it is the
resident process, which must not load what only the command line needs, or the one that reads
a configuration again for it.
"""

from __future__ import annotations

import signal
import sys

from . import door


def main() -> None:
    """Run the one or the other, and exit with its status."""
    if door.is_for_reader():
        from . import reread

        sys.exit(reread.main())
    if door.is_ours():
        from . import lean

        lean.defer("inspect")
        # Until its handlers stand a signal waits: it would end this program, and its workers go
        # on alone. The others who execute us have blocked them; systemd blocks nothing.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        from . import resident

        resident.main()
    else:
        from . import cli

        sys.exit(cli.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
