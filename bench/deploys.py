"""The deploys of a soak: each is ordered again while another one is in progress, and counted.

What came of a deploy is the exit status of its socketprotectorctl.  A soak in which few deploys
have reached a verdict has shown nothing about them, so it fails.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.service import GOOD, Service, status_of

if TYPE_CHECKING:
    import subprocess

#: How long a refused deploy is ordered again, and how often.
REPEATED_S, PAUSE_S = 20.0, 0.2
#: The fewest deploys that must be proved, and that must fail, in each minute of a soak.
PROVED_A_MINUTE, FAILED_A_MINUTE = 1.0, 0.5
_BUSY = 6
_WORDS = {
    0: "proved",
    1: "out of sight",
    2: "not tried",
    3: "failed",
    4: "without a verdict in time",
    5: "serving and not recorded",
    _BUSY: f"refused for {REPEATED_S:g} s, because another one was in progress",
    -signal.SIGKILL: "whose socketprotectorctl was killed",
}


@dataclass
class Ordered:
    """One deploy, until it has ended."""

    name: str
    options: tuple[str, ...]
    until_s: float
    ctl: subprocess.Popen[bytes]
    again_s: float = 0.0  # when to order it again; 0: its socketprotectorctl runs

    def kill(self) -> None:
        """Kill the socketprotectorctl that runs, if one does."""
        if not self.again_s:
            self.ctl.kill()


class Deploys:
    """Orders deploys of a service and counts what came of them."""

    def __init__(self, service: Service) -> None:
        self.counts: Counter[str] = Counter()
        self.repeated = 0
        self.wrong: list[str] = []  # each in words
        self._service = service
        self._ordered: list[Ordered] = []

    def order(self, name: str, *options: str) -> Ordered:
        """Order the deploy of a release, without a wait for the verdict."""
        ctl = self._service.deploy(name, *options)
        made = Ordered(name, options, time.monotonic() + REPEATED_S, ctl)
        self._ordered.append(made)
        return made

    def look(self) -> None:
        """Count what has ended, and order again what was refused."""
        now_s = time.monotonic()
        for each in list(self._ordered):
            if each.again_s:
                if now_s >= each.again_s:
                    each.again_s = 0.0
                    each.ctl = self._service.deploy(each.name, *each.options)
                    self.repeated += 1
                continue
            status = status_of(each.ctl)
            if status is None:
                continue
            if status == _BUSY and now_s < each.until_s:
                each.again_s = now_s + PAUSE_S
                continue
            self._ordered.remove(each)
            self._count(each, status)

    def _count(self, ordered: Ordered, status: int) -> None:
        dry = "--dry-run" in ordered.options
        words = _WORDS.get(status, f"with exit status {status}")
        self.counts[f"dry run {words}" if dry else words] += 1
        if status == 0 and ordered.name not in GOOD:
            self.wrong.append(f"deploy {' '.join((ordered.name, *ordered.options))} succeeded")

    def too_few(self, minutes: float, *, rolling: bool) -> list[str]:
        """Return what was reached less often than a soak of these minutes needs, in words.

        rolling: each replaced worker waits for its clients, so few deploys end within a soak.
        """
        wanted = {"failed": FAILED_A_MINUTE} | ({} if rolling else {"proved": PROVED_A_MINUTE})
        return [
            f"{self.counts[what]} deploys {what}, fewer than {int(rate * minutes)}"
            for what, rate in wanted.items()
            if self.counts[what] < int(rate * minutes)
        ]
