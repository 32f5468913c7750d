"""What is written down for workers: the relay, and a system log of the test's own."""

from __future__ import annotations

import os
import re
import socket
import threading
from pathlib import Path

from tests.procfs import running
from tests.running import MARK, eventually, marked
from tests.scenarios.starting import Start

#: Gives a command a /dev of its own; with /dev/log where the test listens, unless $3 is empty.
OWN_DEV = """
mount -t tmpfs none "$1" && cd "$1" || exit 77
for node in null zero full random urandom tty; do
    : > $node && mount --bind /dev/$node $node || exit 77
done
ln -s /proc/self/fd fd
mkdir shm
if [ "$3" ]; then ln -s "$2" log; fi
mount --rbind . /dev || exit 77
shift 3
cd "$OLDPWD" || exit 77
exec "$@"
"""


class Syslog:
    """Listens as syslogd does, and keeps what it gets."""

    def __init__(self, folder: Path) -> None:
        self.dev = folder / "dev.sh"
        self.dev.mkdir()
        self._path = folder / "syslog.sh"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._path))
        self.seen: list[str] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    @property
    def before(self) -> tuple[str, ...]:
        """Words in front of a command that is to log here."""
        return self._own_dev("there")

    @property
    def before_it_comes(self) -> tuple[str, ...]:
        """Words in front of a command that finds no /dev/log, until it comes."""
        return self._own_dev("")

    def _own_dev(self, there: str) -> tuple[str, ...]:
        script = ("sh", "-c", OWN_DEV, "-", str(self.dev), str(self._path), there)
        return ("unshare", "-m", *script)

    def come(self, pid: int) -> None:
        """Be at /dev/log from now on where that process is."""
        os.symlink(self._path, f"/proc/{pid}/root/dev/log")

    def _listen(self) -> None:
        while data := self._socket.recv(65536):
            self.seen.append(data.decode())

    def wait_for(self, pattern: str) -> str:
        """Wait for a message; returns the first that matches."""
        wanted = re.compile(pattern)

        def found() -> list[str]:
            return [line for line in list(self.seen) if wanted.search(line)]

        eventually(lambda: bool(found()), f"{pattern} among {self.seen}")
        return found()[0]

    def count(self, pattern: str) -> int:
        return sum(1 for line in list(self.seen) if re.search(pattern, line))

    def end(self) -> None:
        """Listen no more, and leave the file."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self._path))
        self._thread.join()
        self._socket.close()

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self.end()


def relays_of(start: Start) -> list[int]:
    """The pids of all relays."""
    return running("log_relay.py", marked(start.environment[MARK]))


def relay_of(start: Start) -> int:
    """The pid of the relay."""
    return next(iter(relays_of(start)), 0)
