"""What gunicorn is to serve in herd.py: the pid that has answered."""

from __future__ import annotations

import os
from typing import Any


def application(environ: Any, start_response: Any) -> list[bytes]:
    said = b"[%d] served\n" % os.getpid()
    start_response("200 OK", [("Content-Length", str(len(said)))])
    return [said]
