"""granian on a listener that it was handed.  Usage: granian_server.py FD

It has no option for that: this uses what is private to its version 2.8.
"""

# mypy: disable-error-code="valid-type, misc, call-arg, unused-ignore"

from __future__ import annotations

import socket
import sys
from typing import Any

from granian._granian import SocketHolder
from granian.server import Server


class Handed(Server):
    def __init__(self, fd: int, **options: Any) -> None:
        super().__init__(**options)
        self._handed = fd

    def _init_shared_socket(self) -> None:
        self._shd = SocketHolder(self._handed, False, self.backlog)
        self._sfd = self._handed
        self._sso = socket.socket(fileno=self._handed)
        self._sso.set_inheritable(True)


if __name__ == "__main__":
    Handed(int(sys.argv[1]), target="asgi_app:app", interface="asgi").serve()
