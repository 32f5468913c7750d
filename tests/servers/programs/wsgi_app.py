"""A WSGI application: each answer is the pid of its process, after WAIT_S."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from release import STATUS

WAIT_S = float(os.environ.get("WAIT_S", "0"))


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    time.sleep(WAIT_S)
    body = f"{os.getpid()}\n".encode()
    start_response(f"{STATUS} {HTTPStatus(STATUS).phrase}", [("Content-Length", str(len(body)))])
    return [body]
