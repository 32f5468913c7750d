"""python -m bench.rivals [NAME...]: the rivals beside ours, as Markdown tables.

What each turn has seen is appended to a file, and a second run of the same commit and round goes
on from there.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.figures import Bystanders, Figure, Scale, machine, table
from bench.hog_rows import hog, one_group
from bench.processes import ROOT, CannotMeasure
from bench.rivals import report
from bench.rivals.catalogue import RIVALS
from bench.rivals.installing import install, version
from bench.rivals.report import Note, Results
from bench.rivals.running import SETTLES_S, Running
from bench.rivals.situations import SITUATIONS
from bench.rows import latency, rate
from bench.service import become_sub_reaper

TARGETS = {"rate": rate, "latency": latency, "hog": hog}


class Run:
    """A run: its situations, and the file of its results."""

    def __init__(self, file: Path, round_s: float, turns: int, hours: float) -> None:
        self._file, self._round_s, self._turns = file, round_s, turns
        self._until_s = time.monotonic() + hours * 3600
        self.notes = report.read(file.read_text().splitlines()) if file.exists() else []
        self._done = report.done(self.notes)
        self.left_out = 0

    def keep(self, note: Note) -> None:
        self.notes.append(note)
        # The line begins with a newline, in case a killed run left its last line incomplete.
        with self._file.open("a") as file:
            file.write("\n" + note.line())

    def turns(self, situation: str, names: Sequence[str]) -> None:
        """Note a situation of all of them."""
        has = [name for name in names if _has(name, situation)]
        for turn, name in report.order(has, self._turns):
            if (name, situation, turn) in self._done:
                continue
            if time.monotonic() > self._until_s:
                self.left_out += 1
                continue
            note = self._turn(name, situation, turn)
            said = note.error or f"{note.seen.get('failed', 0)} failed"
            print(f"{situation}, {name}: {said}", file=sys.stderr, flush=True)
            self.keep(note)

    def _turn(self, name: str, situation: str, turn: int) -> Note:
        each = SITUATIONS[situation]
        with tempfile.TemporaryDirectory(prefix="rivals-", ignore_cleanup_errors=True) as folder:
            try:
                with ExitStack() as stack:
                    if each.one_group:
                        stack.enter_context(one_group())
                    one = stack.enter_context(Running(RIVALS[name], Path(folder), unix=each.unix))
                    if each.reloads:
                        time.sleep(SETTLES_S)
                    return Note(name, situation, turn, each.run(one, self._round_s))
            except (CannotMeasure, OSError, subprocess.SubprocessError) as error:
                return Note(name, situation, turn, {}, " ".join(str(error).split())[-300:])

    def targets(self) -> list[Figure]:
        """Measure the targets, or return the measurements of an earlier run."""
        figures = []
        for name, take in TARGETS.items():
            if ("targets", name, 0) not in self._done:
                if time.monotonic() > self._until_s:
                    self.left_out += 1
                    continue
                taken = take(Scale(quick=self._round_s < 10))
                self.keep(Note("targets", name, 0, {"figures": [vars(each) for each in taken]}))
        for note in self.notes:
            if note.rival == "targets":
                figures += [Figure(**each) for each in note.seen["figures"]]
        return figures


def _has(name: str, situation: str) -> bool:
    rival, each = RIVALS[name], SITUATIONS[situation]
    if each.unix and not rival.at_path:
        return False
    return situation not in rival.without and not (each.reloads and not rival.reload)


def _print(one: Run, names: list[str], chosen: list[str], versions: dict[str, str],
           missing: dict[str, str], figures: list[Figure], where: str) -> None:  # fmt: skip
    results = Results(one.notes)
    ahead = report.better(results, names)
    print(f"# Beside its rivals\n\n{where}\n")
    print("## Where a rival is better\n")
    print("\n".join(f"* {line}" for line in ahead) or "Nowhere in this run.")
    print("\nRates, CPU and p99.9 are compared only with those that run the same worker.\n")
    print(f"## All of them\n\n{report.everyone(results, names)}\n")
    print(f"## The best {report.BEST} and ours\n\n{report.chosen(results, chosen)}\n")
    print("## Targets\n")
    header = "situation", f"{report.GAP}; ours, those only shown, the best rival", ""
    print(report.rows(header, report.gaps(results, names)))
    if figures:
        print(f"\n{table(figures)}")
    print(f"\n## Who they are\n\n{report.manuals(names, versions)}\n")
    print(f"## Not run\n\n{report.not_run(missing)}")
    if errors := report.errors(results, names):
        print("\n## Not measured\n")
        print("\n".join(f"* {line}" for line in errors))
    if one.left_out:
        print(f"\n{one.left_out} turns were left out when the time was over: run it again.")


def main() -> int:
    """Run the comparison that the options name, and print it.  Returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends what it has started
    try:
        return _compare()
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, for example
        print(
            f"python -m bench.rivals: {error}; the same command goes on from here", file=sys.stderr
        )
        return 1


def _compare() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rivals", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RIVALS))
    parser.add_argument("--only", action="append", choices=SITUATIONS, help="this situation")
    parser.add_argument("--turns", type=int, default=2, metavar="N", help="of each, there and back")
    parser.add_argument("--hours", type=float, default=2, metavar="H", help="at most, then print")
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "rivals", metavar="FOLDER")
    parser.add_argument("--round", type=float, default=15, metavar="S", help="seconds of a turn")
    given = parser.parse_args()
    if not 0.1 <= given.round <= 600:
        parser.error(f"--round {given.round:g}: write seconds from 0.1 to 600")
    if not given.hours >= 0:
        parser.error(f"--hours {given.hours:g}: write a number from 0")
    if given.turns < 1:
        parser.error(f"--turns {given.turns}: write a number from 1")
    if unknown := set(given.names) - set(RIVALS):
        parser.error(f"{' '.join(sorted(unknown))}: there are {', '.join(RIVALS)}")
    become_sub_reaper()
    commit = re.search(r"commit (\S+)", about := machine())
    try:
        given.kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--kept {given.kept}: {error.strerror}; choose another")
    file = given.kept / f"{commit[1] if commit else 'unknown'}-{given.round:g}.jsonl"
    one = Run(file, given.round, given.turns, given.hours)
    missing, versions = dict[str, str](), dict[str, str]()
    names = list(dict.fromkeys(given.names)) or list(RIVALS)
    for name in names:
        try:
            install(RIVALS[name])
            versions[name] = version(RIVALS[name])
        except CannotMeasure as error:
            missing[name] = str(error)
    names = [name for name in names if name not in missing]
    with tempfile.TemporaryDirectory(prefix="rivals-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder  # control sockets go there
        bystanders = Bystanders()
        asked = {name: SITUATIONS[name] for name in given.only or SITUATIONS}
        for situation, each in asked.items():
            if each.everyone:
                one.turns(situation, names)
        chosen = names
        if not given.names:
            first = report.best(Results(one.notes), names)
            chosen = [n for n in names if n in first or RIVALS[n].ours or not RIVALS[n].compared]
        for situation, each in asked.items():
            if not each.everyone:
                one.turns(situation, chosen)
        figures = [] if given.names or given.only else one.targets()
        where = (
            f"{about}; rounds of {given.round:g} s; others kept {bystanders.cores():.2f} cores "
            "busy meanwhile"
        )
    _print(one, names, chosen, versions, missing, figures, where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
