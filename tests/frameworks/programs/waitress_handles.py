"""waitress, for an application that handles SIGTERM as programs in containers do."""

from __future__ import annotations

import signal
import sys

from socketprotector_client.waitress import serve

from tests.frameworks.programs.pages import wsgi


def end(*_: object) -> None:
    print("SIGTERM", flush=True)
    sys.exit(0)


signal.signal(signal.SIGTERM, end)
serve(wsgi)
print("ended", flush=True)
