"""Commands that other users run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.procfs import children_of, command_line_of
from tests.running import COMMAND, WORKERS
from tests.scenarios.starting import Start

A, B = "games", "nobody"


class Command:
    """The real command, detached, from a Python that every user can execute."""

    def __init__(self, start: Start, python: tuple[str, str]) -> None:
        self.start = start
        self.python, self.path = python

    def worker(self, name: str, *words: str) -> tuple[str, ...]:
        return (self.python, "-S", "-E", str(WORKERS / f"{name}.py"), *words)

    def up(self, *words: str | Path, **more: Any) -> None:
        ended = self.run(*words, **more)
        assert ended.status == 0, f"{ended}\n{self.start.log}"

    def run(self, *words: str | Path, **more: Any) -> Any:
        environment = {"PYTHONPATH": self.path, **more.pop("environment", {})}
        log = ("--log-file", self.start.log_file) if "relay" not in more else ()
        more.pop("relay", None)
        command = (self.python, *COMMAND[1:])
        return self.start(*log, *words, command=command, environment=environment, **more)

    @property
    def guard(self) -> int:
        return self.start.pid

    @property
    def protector(self) -> int:
        """The one child of the guard that is neither a worker nor an orphaned relay."""
        words = {pid: command_line_of(pid) for pid in children_of(self.start.pid)}
        found = [
            pid
            for pid, said in words.items()
            if "socketprotector" in said and "log_relay.py" not in said
        ]
        return found[0] if found else self.start.pid

    @property
    def address(self) -> str:
        return f"{self.start.folder}/s"

    def worker_pid_of(self, generation: int) -> int:
        """The worker of a generation that has one."""
        found = re.search(rf"event=spawned generation={generation} .*\bpid=(\d+)", self.start.log)
        assert found, self.start.log
        return int(found[1])

    def worker_pid(self) -> int:
        return int(re.findall(r"event=spawned .*\bpid=(\d+)", self.start.log)[-1])
