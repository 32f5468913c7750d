"""`socketprotector-exporter` and `python -m socketprotector.exporter`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run until it is stopped, and exit with the status of that."""
    try:
        from . import entry
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "prometheus_client":
            raise
        print(
            "socketprotector-exporter: prometheus-client is not installed; "
            "pip install 'socketprotector[exporter]'",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(entry.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
