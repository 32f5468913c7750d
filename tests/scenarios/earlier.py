"""Protectors that the code of an earlier commit has started, with this code in its place later."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from bench.earlier import EarlierCode, NoSuchCommit, extract
from socketprotector import __version__
from tests import needs
from tests.c.building import alone_in
from tests.load import Load
from tests.running import DEADLINE_S, Ended, Protector
from tests.scenarios.adopting import kill_protector, revived, upgrade

THIS_CODE = rf"version={re.escape(__version__)}( |$)"


def extracted_once(commit: str, shared: Path) -> Path:
    """Return a folder with the earlier code, one for all processes that pytest runs in."""
    folder, unfinished = shared / commit, shared / f"{commit}.new"
    with alone_in(shared):
        if not folder.exists():
            unfinished.mkdir(exist_ok=True)
            try:
                extract(commit, unfinished)
            except NoSuchCommit as error:
                needs.skip("a git history with earlier code", error)
            unfinished.rename(folder)
    return folder


class Earlier:
    """Starts protectors of the earlier code, until that is replaced."""

    def __init__(
        self, folder: Path, extracted: Path, environment: dict[str, str], options: tuple[str, ...]
    ) -> None:
        """options: in front of those that a protector is started with."""
        self._code = EarlierCode(folder, extracted)
        self._folder = folder
        self.version = extracted.name[:12]
        self._environment = {**environment, **self._code.environment}
        self._options = options
        self.replace, self.put_back = self._code.replace, self._code.put_back
        self.started: list[Protector] = []

    def start(self, *arguments: str | Path) -> Protector:
        """Start one in the foreground, and wait until it serves."""
        words = [*self._options, *map(str, arguments)]
        daemon = Protector(
            words,
            self._environment,
            command=self._code.command,
            cwd=self._folder,  # not where a `socketprotector` of this code would be found
        )
        self.started.append(daemon)
        daemon.ready()
        versions = f"{self.version}|{re.escape(__version__)}"
        assert daemon.log.count(rf"event=start .*version=({versions}) ")
        return daemon


def load_on(daemon: Protector) -> Load:
    return Load(f"127.0.0.1:{daemon.port}", concurrency=8)


def upgraded(daemon: Protector) -> None:
    """Upgrade; this code has gone on."""
    assert re.search(f"event=resumed .*{THIS_CODE}", upgrade(daemon)), daemon.log.text()


def killed(daemon: Protector) -> None:
    """Kill the protector; its guard has started this code, which has gone on."""
    mark = kill_protector(daemon)
    revived(daemon, mark)
    assert re.search(THIS_CODE, daemon.log.wait_for("event=resumed", after=mark))


def ctl_of(code: Path, *words: str) -> Ended:
    """Run the socketprotectorctl of other code.  code: the folder of its packages."""
    done = subprocess.run(
        [sys.executable, "-m", "socketprotector.ctl", *words],
        cwd=code,
        env={**os.environ, "PYTHONPATH": f"{code}:{code / 'client_lib'}"},
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
        text=True,
    )
    return Ended(done.returncode, done.stdout, done.stderr)
