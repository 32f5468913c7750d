"""Has every descriptor in use but for a few, then serves without a limit of its own."""

from __future__ import annotations

import os
import resource
import sys

from socketprotector_client import serve

from tests.client.programs.talk import say, talk

keep_free = int(sys.argv[1])
hoard: list[int] = []
soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)


def fill(connection: object, peer: object) -> None:
    """Leave nothing free after the first connection; let go when its client says so."""
    if not hoard:
        try:
            while True:
                hoard.append(os.dup(0))
        except OSError:
            pass
        for fd in hoard[-keep_free:] if keep_free else ():
            os.close(fd)
        say("full")
    talk(connection)  # type: ignore[arg-type]


serve(fill, threads=16, limit=1000)
