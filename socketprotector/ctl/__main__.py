"""`socketprotectorctl` and `python -m socketprotector.ctl`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, and exit with its status."""
    from . import entry

    sys.exit(entry.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
