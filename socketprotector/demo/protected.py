"""The protector of the demo, in the foreground under its guard, and the releases that it serves.

One folder has the control socket, the log, a folder for each release, and the link `current` to one
release.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..ctl import discovery
from ..ctl.client import Client, Message
from ..ctl.errors import ControlError
from ..ctl.fields import listed, number_in, text_in
from ..system import privileges
from ..system.cleanup import on_error

PROGRAMS = {
    "SocketProtector": (sys.executable, "-P", "-m", "socketprotector"),
    "socketprotectorctl": (sys.executable, "-P", "-m", "socketprotector.ctl"),
    "python": (os.path.basename(sys.executable),),  # by its name, which the demo shows
}
#: Variables that a service manager has set for the demo, not for this protector.
_NOT_FOR_IT = ("LISTEN_", "NOTIFY_SOCKET", "WATCHDOG_", "FDSTORE")
_ANSWER_S = 2.0
_STOP_S = 20.0
WORKERS = 2
MISSING = "payments"
RELEASE = """\
import sys

from socketprotector.sample_client.__main__ import main

sys.argv[1:] = ["0"]  # the port, if it ran alone
sys.stdout = None  # where it would print each line
main()
"""
BROKEN = f"import {MISSING}\n{RELEASE}"


def lay_out(folder: Path) -> None:
    """Make the folders of three releases, the last one broken, and choose the first."""
    for number, text in enumerate((RELEASE, RELEASE, BROKEN), 1):
        release = folder / f"release-{number}"
        release.mkdir()
        (release / "app.py").write_text(text, encoding="ascii")
    choose(folder, 1)


def choose(folder: Path, number: int) -> None:
    """Make `current` lead to a release, like `ln -sfn`, but the link is never missing."""
    link = folder / "next"
    link.symlink_to(f"release-{number}")
    link.replace(folder / "current")


def free_name() -> str:
    """Return a name that no protector has, as far as socketprotectorctl finds them."""
    names = discovery.names(discovery.query_all_sockets())
    # Protectors that share a name are listed with a listener's name, such as `web:8000`.
    taken = {each.partition(":")[0] for each in names}
    return "demo" if "demo" not in taken else f"demo-{os.getpid()}"


class Protected:
    """A running protector; the caller ends it."""

    def __init__(self, folder: Path, name: str) -> None:
        """Start the protector, without waiting until it serves.  Raises OSError."""
        self.folder = folder
        self.name = name
        self._environment = {
            **{name: v for name, v in os.environ.items() if not name.startswith(_NOT_FOR_IT)},
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}",
            "XDG_RUNTIME_DIR": str(folder),
        }
        self._control = str(folder / "socketprotector" / f"{name}.control")
        self.words = (
            *("SocketProtector", "-f", "--guard", "--name", name, "--workers", str(WORKERS)),
            *("--log-file", "log", "--chdir", "current", "127.0.0.1:0", "--", "python", "app.py"),
        )
        with (folder / "output").open("wb") as output:
            self._process = self.run(*self.words, stdout=output, lasting=True)

    def run(
        self, *words: str, stdout: IO[bytes] | int, lasting: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start one of SocketProtector's programs in the folder, with stderr as stdout.

        lasting: run the program in its own session, until we end it or are killed.  Raises OSError.
        """
        return subprocess.Popen(
            [each for word in words for each in PROGRAMS.get(word, (word,))],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            start_new_session=lasting,
            preexec_fn=_stop_with_parent if lasting else None,
        )

    def status(self) -> Message | None:
        """Return the protector's status; None if it does not answer (yet)."""
        try:
            with Client(self._control, _ANSWER_S) as client:
                return client.request("status")
        except ControlError:
            return None

    @property
    def has_ended(self) -> bool:
        """Whether its guard has ended, and with it the protector."""
        return self._process.poll() is not None

    def said(self, lines: int) -> list[str]:
        """Return the end of its log, and of its other output."""
        files = (self.folder / name for name in ("log", "output"))
        texts = (
            each.read_text(encoding="utf-8", errors="replace") for each in files if each.exists()
        )
        return [line for text in texts for line in text.splitlines()[-lines:]]

    def end(self) -> None:
        """End the protector and its workers at once, if it runs; return when they are gone.

        Raises TimeoutExpired after killing the protector; its workers end when they notice that.
        """
        if not self.has_ended:
            self._process.send_signal(signal.SIGINT)
            with on_error(os.killpg, self._process.pid, signal.SIGKILL):
                self._process.wait(_STOP_S)


def _stop_with_parent() -> None:
    with suppress(OSError):  # after this error, a killed demo leaves this process behind
        privileges.end_with_parent(signal.SIGINT)


def address_of(status: Message) -> str:
    """Return the address that clients connect to, HOST:PORT."""
    return text_in(listed(status, "listeners")[0], "address").removeprefix("tcp:")


def workers_of(status: Message) -> frozenset[int]:
    """Return the pids of the ready workers of the serving generation."""
    return frozenset(
        number_in(worker, "pid")
        for generation in listed(status, "generations")
        if generation.get("number") == status.get("route")
        for worker in listed(generation, "workers")
        if worker.get("state") == "ready"
    )
