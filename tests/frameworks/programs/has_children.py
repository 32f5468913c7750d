"""The applications of pages.py, in processes each of which has started another one."""

from __future__ import annotations

import subprocess

from socketprotector_client import post_fork

from tests.frameworks.programs.pages import asgi, wsgi

__all__ = ["asgi", "wsgi"]


@post_fork
def begin(number: int) -> None:
    subprocess.Popen(["sleep", "3600"])


begin(0)
