"""A protector's whole life in one go, in whatever surroundings: nothing of it may fail there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests import needs
from tests.running import DEADLINE_S, WORKERS, Lines, Protector, ask
from tests.scenarios.adopting import kill_protector, revived
from tests.systems import elsewhere

ELSEWHERE = (sys.executable, str(Path(__file__).with_name("elsewhere.py")))
NAME = "life"
MISHAP = re.compile("Traceback|Warning")
#: Runs for every Python there is, so both need nothing but the standard library.
WORKER = {"connection": "many", "listener": "accepts"}


def under_unit(unit: Path) -> tuple[str, ...]:
    """Return a command that executes another where a call that a unit forbids kills its process."""
    if not elsewhere.can_filter_as_systemd():
        needs.skip("systemd-analyze, libseccomp")
    return (*ELSEWHERE, "--unit", str(unit), "--")


@dataclass
class Surroundings:
    """Where it is to live."""

    place: Path  # where its files go
    environment: Mapping[str, str]
    through: Sequence[str] = ()  # a command that executes another one in its place
    python: Sequence[str] = (sys.executable,)
    options: Sequence[str] = ()
    mode: str = "connection"
    more: Mapping[str, str] = field(default_factory=dict)  # in its environment
    daemon: Sequence[str] = ()  # its command, if it is not one of WORKER
    orders: Sequence[str] = ()  # more of socketprotectorctl

    @property
    def variables(self) -> Mapping[str, str]:
        """Its environment, but for what it inherits: no process may warn of anything."""
        return {**self.environment, "PYTHONWARNINGS": "error", **self.more}

    @property
    def config(self) -> Path:
        return self.place / "web.toml"

    def write(self, comment: str = "") -> None:
        # As tests.scenarios.tools.worker: it is not the worker that is looked at.
        daemon = [*self.daemon]
        if not daemon:
            daemon = [self.python[0], "-S", "-E", str(WORKERS / f"{WORKER[self.mode]}.py")]
        text = [f"# {comment}", f"command = {json.dumps(daemon)}", 'listen = ["127.0.0.1:0"]']
        text += [f'handoff = "{self.mode}"']
        if self.mode == "listener":
            text += ['ready = "after:100ms"']
        self.config.write_text("\n".join(text) + "\n", encoding="utf-8")

    def command(self, module: str = "socketprotector") -> tuple[str, ...]:
        return (*self.python, "-m", module)

    def run(self, *words: str, module: str = "socketprotector") -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [*self.through, *self.command(module), *words],
            env={**os.environ, **self.variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DEADLINE_S,
            check=False,
            text=True,
        )

    def ctl(self, *words: str) -> str:
        """Ask a protector that lives here; it answers."""
        done = self.run(*words, module="socketprotector.ctl")
        assert done.returncode == 0, done.stderr
        assert not MISHAP.search(done.stderr), done.stderr
        return done.stdout


def lived(around: Surroundings) -> Lines:
    """Check, start, reload, upgrade, kill, ask, stop: each works.  Returns the log."""
    around.write()
    checked = around.run("--check", "--config", str(around.config), *around.options)
    assert checked.returncode == 0, checked.stderr
    pid_file = around.place / "pid"
    words = ("--guard", "--name", NAME, "--pid-file", str(pid_file), *around.options)
    daemon = Protector(
        [*words, "--config", str(around.config)],
        around.variables,
        through=around.through,
        command=around.command(),
    )
    try:
        _live(daemon.ready(), around, pid_file)
        return daemon.log
    finally:
        daemon.end()
        print(f"--- log of protector {daemon.pid} ---\n{daemon.log.text()}\n{daemon.out.text()}")


def _live(daemon: Protector, around: Surroundings, pid_file: Path) -> None:
    address = ("127.0.0.1", daemon.port)
    assert ask(address)
    around.write("read again")
    daemon.reload()
    assert ask(address)
    daemon.log.wait_for(r"event=resumed\b", after=daemon.signal(signal.SIGUSR2))
    assert ask(address)
    revived(daemon, kill_protector(daemon))
    assert ask(address)
    daemon.reload()
    status = json.loads(around.ctl("--name", NAME, "status", "--json"))
    assert status["generations"][-1]["phase"] == "serving"
    assert NAME in around.ctl("list")
    for order in around.orders:
        around.ctl("--name", NAME, *order.split())
        assert ask(address)
    around.ctl("--pid-file", str(pid_file), "reload", "--wait")
    assert ask(address)
    daemon.stop()
    assert not pid_file.exists()
    for text in (daemon.log.text(), daemon.out.text()):
        assert not MISHAP.search(text)
