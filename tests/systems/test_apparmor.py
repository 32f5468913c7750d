"""The AppArmor profile in init.d allows each file that a protector and its helpers open.

No kernel is asked: strace says what they open, and the rules are read here.

Source: apparmor.d(5).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import needs
from tests.running import ROOT, WORKERS
from tests.systems.life import Surroundings, lived

pytestmark = needs.programs("apparmor_parser", "strace")

PROFILE = ROOT / "init.d" / "apparmor"
DAEMON = "/bin/cat"
#: Where the profile names other files: the program, its Python, their files, and the daemon's.
OURS = {str(ROOT), sys.prefix, sys.base_prefix, tempfile.gettempdir(), os.path.realpath(DAEMON)}
#: A version of cgroups without which nothing is missing; the units forbid it, too.
NOT_NEEDED = re.compile("/sys/fs/cgroup/.*/cgroup.event_control$")
_OPENED = re.compile(r'^openat\([^"]*"[^"]*", (O_[A-Z_|]+).* = \d+<(/.*?)>(?:\(deleted\))?$', re.M)
_RULE = re.compile(r"^\s*(?:owner )?((?:/|@\{)\S*)\s+([a-zA-Z]+),$", re.M)


class Profile:
    """The rules for files in a profile."""

    def __init__(self, text: str) -> None:
        """text: as apparmor_parser prints it, without includes."""
        self._variables = dict(re.findall(r"^@\{(\w+)\}\s*=\s*(.*)$", text, re.M))
        self.rules = [
            (re.compile(self._pattern(path)), {*modes}) for path, modes in _RULE.findall(text)
        ]

    def _pattern(self, path: str) -> str:
        found, depth = "", 0
        for part in re.split(r"(@\{\w+\}|\*\*|\[[^]]*\]|[*?{},])", path):
            depth += {"{": 1, "}": -1}.get(part, 0)
            if part.startswith("@{"):
                values = self._variables[part[2:-1]].split()
                # The parser takes several slashes for one.
                found += f"(?:{'|'.join(self._pattern(each).rstrip('/') for each in values)})"
            elif part.startswith("["):
                found += part
            elif part == ",":
                found += "|" if depth else ","
            else:
                wild = {"**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")"}
                found += wild.get(part, re.escape(part))
        return found

    def allows(self, path: str, modes: set[str]) -> bool:
        given = [allowed for pattern, allowed in self.rules if pattern.fullmatch(path)]
        return modes <= {mode for allowed in given for mode in allowed}


def modes_of(flags: set[str]) -> set[str]:
    """Return what a rule must allow for these flags of open(2)."""
    if "O_PATH" in flags:
        return set()
    if "O_RDWR" in flags:
        return {"r", "w"}
    return {"w"} if "O_WRONLY" in flags else {"r"}


@pytest.fixture(scope="session")
def profile() -> Profile:
    read = ["apparmor_parser", "--preprocess", str(PROFILE)]
    done = subprocess.run(read, check=True, capture_output=True, text=True)
    return Profile(done.stdout)


def test_the_rules_are_understood(profile: Profile) -> None:
    assert profile.allows("/run/socketprotector/web/pid", {"r", "w"})
    assert profile.allows("/proc/77/environ", {"r"})
    assert not profile.allows("/proc/77/environ", {"w"})
    assert not profile.allows("/proc/77/x/environ", {"r"})
    assert not profile.allows("/etc/shadow", {"r"})


def test_the_profile_grants_the_capabilities_of_the_unit() -> None:
    unit = (ROOT / "init.d" / "socketprotector.service").read_text().replace("\\\n", "")
    [granted] = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.M)
    allowed = re.findall(r"^  capability (\w+),$", PROFILE.read_text(), re.M)

    assert sorted(f"CAP_{each.upper()}" for each in allowed) == sorted(granted.split())


@pytest.mark.costly
@pytest.mark.parametrize(
    ("mode", "daemon", "options"),
    [
        ("connection", (sys.executable, str(WORKERS / "echo.py")), ("--max-memory", "1G")),
        ("listener", (), ()),
        # The prober reads what OpenSSL reads.
        ("stdio", (DAEMON,), ("--health", "https:/", "--health-every", "100ms")),
    ],
)
def test_the_profile_allows_each_file_that_is_opened(
    profile: Profile,
    tmp_path: Path,
    marked_environment: dict[str, str],
    mode: str,
    daemon: tuple[str, ...],
    options: tuple[str, ...],
) -> None:
    tracer = ("strace", "-D", "-ff", "--seccomp-bpf", "-y", "-qq", "-e", "trace=openat")
    checks = ("--settle", "100ms", "--settle-check", "true", "--log-prefix")
    around = Surroundings(
        tmp_path,
        marked_environment,
        (*tracer, "-s", "4096", "-o", str(tmp_path / "calls")),
        mode=mode,
        daemon=daemon,
        options=(*checks, *options),
        orders=("hold --for 1s", "release", "upgrade"),
    )
    lived(around)

    opened = set()
    for calls in tmp_path.glob("calls.*"):  # one of each process
        for words, path in _OPENED.findall(calls.read_text(errors="replace")):
            flags = {*words.split("|")}
            folder = "/" * ("O_DIRECTORY" in flags and path != "/")
            opened.add((path + folder, frozenset(modes_of(flags))))
    missing = {
        f"{re.sub('[0-9]+', 'N', path)} {''.join(sorted(modes))}"
        for path, modes in opened
        if not any(Path(path).is_relative_to(each) for each in OURS)
        if not NOT_NEEDED.match(path) and not profile.allows(path, {*modes})
    }
    assert len(opened) > 50
    assert missing == set(), "\n".join(sorted(missing))
