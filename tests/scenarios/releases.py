"""A folder of releases with a link `current`, and a protector that starts one of them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.procfs import environment_of
from tests.running import WORKERS, Ended, eventually
from tests.scenarios.operating import Operated
from tests.scenarios.tools import Release
from tests.unit.ctl.conftest import run

COMMAND = ("{release}/daemon",)
#: It runs without the client library, which would be slower.
MANY = (sys.executable, "-S", "-E", str(WORKERS / "many.py"))


class Releases:
    """Releases 1, 2 and 3, which serve, and bad, which ends at once; `current` names 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "releases"
        self.live = folder / "live"
        self.current = self.live / "current"
        self.live.mkdir(parents=True)
        for name in ("1", "2", "3"):
            self.add(name, *MANY)
        self.add("bad", "sh", "-c", "echo no such table >&2; exit 7")
        self.current.symlink_to("../releases/1")

    @property
    def options(self) -> tuple[str, ...]:
        """The options of a protector that uses them."""
        return ("--releases", str(self.folder), "--current", str(self.current))

    def add(self, name: str, *command: str) -> Release:
        """Make a release whose daemon is this command."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        made = Release(self.folder / name / "daemon")
        made.becomes(*command)
        return made

    @property
    def named(self) -> str:
        """The release that `current` names."""
        return Path(os.readlink(self.current)).name

    def point_at(self, name: str) -> None:
        """Move `current` as an operator would."""
        new = self.live / "by-hand"
        new.symlink_to(self.folder / name)
        new.rename(self.current)


def serving(one: Operated) -> str:
    """The release whose workers get new clients, by what they began with."""
    status = one.status()
    names = {environment_of(pid)["SOCKETPROTECTOR_RELEASE"] for pid in one.pids(status["route"])}
    [name] = names
    [known] = [e["release"] for e in status["generations"] if e["number"] == status["route"]]
    assert name == known == status["releases"]["serving"]
    return name


def ctl(one: Operated, *words: str) -> Ended:
    """Run socketprotectorctl."""
    return run("--control", str(one.path), *words)


def deployed(one: Operated, name: str, *more: str) -> None:
    """Deploy a release, which succeeds."""
    ended = ctl(one, "deploy", name, *more)
    assert ended.status == 0, ended
    assert ended.out.startswith(f"deployed: release {name}"), ended


def starts(one: Operated, number: int) -> None:
    """Wait until the first worker of a generation has been started."""
    one.daemon.log.wait_for(f"event=spawned generation={number} ")


def way(releases: Releases) -> list[str]:
    """The way back, as it is on disk."""
    found: list[str] = json.loads((releases.live / "current.history").read_text())["way"]
    return found


def entries(releases: Releases) -> list[dict[str, object]]:
    """What was tried, as it is on disk."""
    history = json.loads((releases.live / "current.history").read_text())
    found: list[dict[str, object]] = history["entries"]
    return found


def saved(one: Operated) -> None:
    """Wait until `current` and the history are on disk."""
    eventually(lambda: bool(one.status()["releases"]["saved"]), "current on disk")
