"""The run that a log records: which generations and workers there were, line by line.

Pure: lines in, what was so after each of them out.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from socketprotector.model.log_format import is_own


@dataclass
class Told:
    """A generation, as far as the log shows."""

    phase: str
    workers: dict[int, int] = field(default_factory=dict)  # number -> pid
    ready: set[int] = field(default_factory=set)


@dataclass
class Run:
    """What is so after a line."""

    generations: dict[int, Told] = field(default_factory=dict)
    #: Each change of a phase so far; "gone" is the last of each.
    phases: list[tuple[int, str]] = field(default_factory=list)
    route: int | None = None
    wanted: int | None = None
    ended: bool = False

    def pids(self) -> dict[int, set[int]]:
        """The processes of each generation."""
        return {number: set(each.workers.values()) for number, each in self.generations.items()}

    def become(self, number: int, phase: str) -> None:
        told = self.generations.setdefault(number, Told(""))
        if told.phase != phase:
            told.phase = phase
            self.phases.append((number, phase))
        if phase == "gone":
            del self.generations[number]

    def of_worker(self, number: int) -> Told | None:
        return next((told for told in self.generations.values() if number in told.workers), None)


def fields_of(line: str) -> dict[str, str]:
    """The fields of a line of the protector's own, whatever its form; of others' there are none."""
    if not is_own(line):
        return {}
    if '{"time": ' in line:
        return {name: str(value) for name, value in json.loads(line[line.index("{") :]).items()}
    words = shlex.split(line[line.index("event=") :])
    return dict(word.split("=", 1) for word in words if "=" in word)


def retell(lines: Iterable[str]) -> Run:
    """Return what is so after all of these lines."""
    run = Run()
    for line in lines:
        tell(run, fields_of(line))
    return run


def retold(lines: Iterable[str]) -> Iterator[Run]:
    """Yield the same run after each line."""
    run = Run()
    for line in lines:
        tell(run, fields_of(line))
        yield run


def tell(run: Run, said: Mapping[str, str]) -> None:
    """Take in one line."""
    number = int(said.get("generation", 0))
    worker = int(said.get("worker", 0))
    told = run.generations.get(number)
    match said.get("event"):
        case "spawned":
            if told is None:
                run.become(number, "starting")
            run.generations[number].workers[worker] = int(said["pid"])
        case "worker-ready" if told is not None:
            told.ready.add(worker)
        case "exited" if worker and told is not None:
            told.workers.pop(worker, None)
            told.ready.discard(worker)
        case "route":
            run.route = number
            if told is not None and told.phase == "starting":
                run.become(number, "settling")
        case "ready" | "reloaded" | "recovered":
            for other, each in tuple(run.generations.items()):
                if each.phase == "serving":
                    run.become(other, "draining")
            run.become(number, "serving")
        case "reload-failed" | "start-failed" | "retrying" if told is not None:
            run.become(number, "draining" if told.phase == "settling" else "abandoned")
        case "dry-run-passed" | "dry-run-failed" if told is not None:
            run.become(number, "abandoned")
        case "channel-broken" if told is not None:
            run.become(number, "abandoned" if told.phase == "starting" else "draining")
        case "stopping":
            for other, each in tuple(run.generations.items()):
                if each.phase in ("starting", "settling", "serving"):
                    run.become(other, "abandoned" if each.phase == "starting" else "draining")
        case "drained":
            run.become(number, "gone")
            run.route = None if run.route == number else run.route
        case "scaled":
            run.wanted = int(said["reason"].split()[0])
        case "stopped":
            run.ended = True
