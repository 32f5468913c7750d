"""How a figure is taken and shown: alternating runs, medians, and the bound beside each.

Single runs on a small shared machine differ by 15 %, so nothing here compares a run with
one from another minute: A B A B, and each ratio is of two neighbours.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Scale:
    """How long to measure; `--quick` shows that it runs, not what it costs."""

    quick: bool

    def __call__(self, whole: float, quick: float) -> float:
        return quick if self.quick else whole

    def rounds(self, whole: int, quick: int = 2) -> int:
        """Return how many times to alternate."""
        return quick if self.quick else whole


@dataclass(frozen=True)
class Figure:
    """One line of the table.  `holds` is None where nothing was promised."""

    what: str
    value: str
    must: str = ""
    aim: str = ""
    holds: bool | None = None
    notes: list[str] = field(default_factory=list)


def alternately(rounds: int, *takers: Callable[[], Taken]) -> list[list[Taken]]:
    """Call the takers in turn, `rounds` times; return what each returned.

    Forwards and backwards by turns, so that a machine that grows slower favours none of them.
    """
    taken: list[list[Taken]] = [[] for _ in takers]
    for turn in range(rounds):
        both = list(zip(taken, takers, strict=True))
        for results, take in reversed(both) if turn % 2 else both:
            results.append(take())
    return taken


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, str]:
    """Return the median of the ratios of neighbours, and it in words with its spread."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    middle = median(ratios)
    return middle, f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


class Bystanders:
    """How much of the machine went to processes that this run did not start.

    Needs all of ours to have been waited for; on a busy machine the figures mean little.
    """

    def __init__(self) -> None:
        self._begun_s = time.monotonic()
        self._busy_s = self._all_busy_s() - self._ours_s()

    def cores(self) -> float:
        """Return the cores that they kept busy since the beginning, on average."""
        busy_s = self._all_busy_s() - self._ours_s() - self._busy_s
        return max(0.0, busy_s / (time.monotonic() - self._begun_s))

    def _all_busy_s(self) -> float:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()[1:8]
        user, nice, system, _, _, irq, softirq = map(int, first)
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

    def _ours_s(self) -> float:
        spent = os.times()
        return spent.user + spent.system + spent.children_user + spent.children_system


def machine() -> str:
    """Say on what the figures were taken."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"  # an unpacked release
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores, kernel {platform.release()}, {platform.python_implementation()} "
        f"{platform.python_version()}, commit {commit}"
    )


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as Markdown, the notes below the table."""
    lines = ["| what | measured | must | aim | |", "|---|---|---|---|---|"]
    notes: list[str] = []
    for figure in figures:
        verdict = {True: "holds", False: "**missed**", None: ""}[figure.holds]
        lines.append(
            f"| {figure.what} | {figure.value} | {figure.must} | {figure.aim} | {verdict} |"
        )
        if figure.notes:
            notes += ["", f"{figure.what}:", *(f"- {note}" for note in figure.notes)]
    return "\n".join(lines + notes)
