"""make fleet-demo: releases to five hosts under load, a bad one stopped at its first host.

Five namespaces with a protector, an exporter and sshd each; HAProxy and clients in a sixth, and
Ansible in a seventh.  Nothing of it is on the machine's own network.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench.processes import CannotMeasure
from tests.fleet.hosts import LIMIT_S, NEEDED, TOOLS, Fleet, Load, fleet

_DEPLOY = "Deploy it, and wait for the verdict"
#: What is said of a host, by the task of the playbook and its result there.
_STEPS = {
    ("Put the release beside the others", "changed"): "has the files",
    (_DEPLOY, "changed"): "serves it",
    (_DEPLOY, "ok"): "served it already",
    (_DEPLOY, "fatal"): "has not taken it",
}


def _missing() -> list[str]:
    """Return what this needs and does not find."""
    missing = [f"{each} (Debian's package has it)" for each in NEEDED if shutil.which(each) is None]
    if os.geteuid() != 0:
        missing.append("root, for namespaces")
    if not (TOOLS / "ansible-playbook").exists():
        missing.append(f"ansible-playbook in {TOOLS} (make fleet-demo installs it)")
    return missing


class Play:
    """What a release does on each host, by the lines that Ansible writes."""

    def __init__(self) -> None:
        self.tried: set[str] = set()  #: The hosts that started the release at all.
        self._task = ""

    def heard(self, line: str) -> str:
        """Return what a line says of a host; empty where that is no news."""
        if found := re.match(r"TASK \[(?:\S+ : )?(.*)\]", line):
            self._task = found[1]
            return ""
        found = re.match(r"(ok|changed|fatal): \[(\w+)\]", line)
        words = _STEPS.get((self._task, found[1])) if found else None
        if found is None or words is None:
            return ""
        if self._task == _DEPLOY and found[1] != "ok":
            self.tried.add(found[2])
        return f"{found[2]} {words}"


def _row(five: Fleet, load: Load, what: str, version: str) -> tuple[str, ...]:
    """Release, and return a row of the table."""
    before, begun_s = load.told(), time.monotonic()
    print(f"\n$ ./release -e version={version}      # {what}", flush=True)
    play, said = Play(), ""
    releasing = five.releasing(version)
    assert releasing.stdout is not None
    for line in releasing.stdout:
        said += line
        if news := play.heard(line):
            print(f"    {time.monotonic() - begun_s:3.0f} s  {news}", flush=True)
    status = releasing.wait(LIMIT_S)
    seconds = time.monotonic() - begun_s
    after = load.told()
    # What the play says of the host at which it stops, in lines that Ansible has folded.
    for line in re.findall(r"- '((?:[^']|\'\')*)'", said):
        print(f"    {' '.join(line.split())}")
    versions, size = five.versions, five.SIZE
    tried = f"{len(play.tried)} of {size}"
    print(f"    tried on {tried}; exit status {status}; the hosts serve {' '.join(versions)}")
    asked, failed = after.answered - before.answered, len(after.failures) - len(before.failures)
    serve = f"{versions.count(version)} of {size}"
    return (what, tried, serve, f"{seconds:.0f} s", f"{asked:,}", f"{failed} failed")


def main() -> int:
    """Show it; 1 if a request has failed, 2 if something is missing."""
    if missing := _missing():
        print("NOT SHOWN: this needs\n  " + "\n  ".join(missing), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        options = ("--settle", "1s", "--settle-check", "http:/healthz")
        print("five hosts, HAProxy, sshd, Ansible: starting", flush=True)
        begun_s = time.monotonic()

        def say(news: str) -> None:
            print(f"    {time.monotonic() - begun_s:3.0f} s  {news}", flush=True)

        with fleet(Path(folder), *options, say=say) as five:
            load = Load(five.balancer, 100)
            rows = [
                _row(five, load, "a good release", "2"),
                _row(five, load, "the same again", "2"),
                _row(five, load, "a bad release", "bad"),
                _row(five, load, "another good one", "3"),
            ]
            told = load.told()
            load.end()
    heads = ("release", "tried on", "serves on", "took", "requests", "")
    widths = [max(len(each[at]) for each in (heads, *rows)) for at in range(len(heads))]
    print()
    for row in (heads, *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print(f"\n{told.answered:,} requests, {len(told.failures)} failed; the longest took "
          f"{told.longest_s * 1000:.0f} ms")  # fmt: skip
    return 1 if told.failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (AssertionError, CannotMeasure) as error:
        sys.exit(f"NOT SHOWN: {error}")
