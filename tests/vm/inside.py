"""Run all checks inside of the machine; say what came of each on a serial line, as JSON.

    python -m tests.vm.inside TTY

The lines: {"system": {...}}, {"began": NAME}, {"saying": TEXT} while it runs, {"check": NAME,
"outcome": ..., "said": [...], "journal": TEXT}, and at last {"done": true}.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
import traceback
import tty
from collections.abc import Callable
from typing import Any

from .catalogue import CHECKS
from .guest import NotRun, run
from .promises import Say

#: A check that takes longer than all its own deadlines should: the others come nevertheless.
_LONGEST_S = 1500


def main() -> None:
    line = os.open(sys.argv[1], os.O_WRONLY | os.O_NOCTTY)
    tty.setraw(line)

    def say(**said: Any) -> None:
        left = (json.dumps(said) + "\n").encode()
        while left:
            left = left[os.write(line, left) :]

    signal.signal(signal.SIGALRM, _too_long)
    say(system=_system())
    wanted = _wanted()
    for name, check in CHECKS.items():
        if name in wanted:
            say(began=name)
            say(check=name, **_outcome(check, lambda text: say(saying=text)))
    say(done=True)


def _wanted() -> set[str]:
    """Return the names that `checks=` on the kernel's command line asks for, by their numbers."""
    with open("/proc/cmdline", encoding="ascii") as words:
        [asked] = [word for word in words.read().split() if word.startswith("checks=")]
    names = list(CHECKS)
    return {names[int(number)] for number in asked.partition("=")[2].split(",") if number}


def _too_long(*_: object) -> None:
    raise TimeoutError(f"it took more than {_LONGEST_S} s")


def _outcome(check: Callable[[Say], None], tell: Say) -> dict[str, Any]:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        tell(text)

    began = time.monotonic()
    journal = ""
    signal.alarm(_LONGEST_S)
    try:
        check(say)
        outcome = "passed"
    except NotRun as why:
        outcome = "not run"
        said.append(str(why))
    except Exception:
        outcome = "failed"
        said.append(traceback.format_exc())
        journal = run("journalctl", "-b", "-o", "short-monotonic", "--no-pager", "-n", "120").stdout
    finally:
        signal.alarm(0)
    took_s = round(time.monotonic() - began, 1)
    return {"outcome": outcome, "said": said, "journal": journal, "took_s": took_s}


def _system() -> dict[str, str]:
    with open("/etc/os-release", encoding="utf-8") as release:
        names = dict(
            each.rstrip().replace('"', "").split("=", 1) for each in release if "=" in each
        )
    return {
        "release": names.get("PRETTY_NAME", "?"),
        "kernel": platform.release(),
        "systemd": run("systemctl", "--version").stdout.split("\n")[0],
        "python": platform.python_version(),
        "control groups": run("stat", "-f", "-c", "%T", "/sys/fs/cgroup").stdout.strip(),
        "processors": str(os.cpu_count()),
    }


if __name__ == "__main__":
    main()
