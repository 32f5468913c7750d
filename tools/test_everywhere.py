#!/usr/bin/env python3
"""Run `make test` as each kind of user, with each Python and Debian, and under load.

    tools/test_everywhere.py [--times N] [--roots FOLDER] [SETUP...]

Each run has a fresh copy of what is committed here.  At the end a table names each set-up, how
long it took and the last line of pytest.  Logs are in build/everywhere.  Needs root; --roots keeps
the Debians that it makes.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
LOGS = HERE / "build" / "everywhere"
TEST = ("make", "test", "LOGS=")
#: The packages of a minimal Debian for the tests; `make test` installs further ones, if it may.
PACKAGES = "python3,python3-venv,make,git,ca-certificates"
#: A script that enters a container; only bound parts of the machine are visible in it.
ENTERS = """
set -eu
root=$1; shift
mount --make-rprivate /
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
while [ "$1" != -- ]; do
    mkdir -p "$(dirname "$root$1")"
    if [ -d "$1" ]; then mkdir -p "$root$1"; else touch "$root$1"; fi
    mount --bind "$1" "$root$1"
    shift
done
shift
cd "$root"
pivot_root . .
umount -l .
cd /srv/clone
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec "$@"
"""


@dataclass
class Result:
    """The result of a run."""

    setup: str
    wall_s: float
    cpu_s: float
    good: bool
    last: str


def clone(folder: Path) -> Path:
    """Clone this repository into a folder, and return the clone."""
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", HERE, folder / "clone"], check=True)
    return folder / "clone"


@contextmanager
def copy(mode: int = 0o755) -> Iterator[Path]:
    """Yield a clone in a temporary folder of this mode."""
    with tempfile.TemporaryDirectory(prefix="everywhere-", dir="/var/tmp") as name:
        Path(name).chmod(mode)
        yield clone(Path(name))


def run(words: tuple[str, ...], log: Path, cwd: Path) -> bool:
    """Run a command with its output in a log; return whether it succeeded."""
    with log.open("w", encoding="utf-8") as out:
        return subprocess.run(words, cwd=cwd, stdout=out, stderr=subprocess.STDOUT).returncode == 0


class Setups:
    """The set-ups; each method runs the tests once and writes a log."""

    def __init__(self, roots: Path) -> None:
        self.roots = roots
        self.all: dict[str, Callable[[Path], bool]] = {
            "user": lambda log: self.as_user(log),
            "bare-user": lambda log: self.in_debian(log, "bookworm", "tools/as-user"),
            "root-0700": lambda log: self.as_root(log, sys.executable, mode=0o700),
            "3.12": lambda log: self.as_root(log, python("3.12")),
            "3.13": lambda log: self.as_root(log, python("3.13")),
            "beside": self.beside,
            "hogs": self.hogs,
            "trixie": lambda log: self.in_debian(log, "trixie"),
        }

    def as_user(self, log: Path) -> bool:
        """Run as an ordinary user with Debian's Python, and the packages that root installs."""
        subprocess.run(["make", "-s", "test-tools"], cwd=HERE, check=False)
        words = (str(HERE / "tools" / "as-user"), *TEST, "PYTHON=/usr/bin/python3")
        return run(words, log, HERE)

    def as_root(self, log: Path, interpreter: str, mode: int = 0o755) -> bool:
        with copy(mode) as place:
            return run((*TEST, f"PYTHON={interpreter}"), log, place)

    def beside(self, log: Path) -> bool:
        """Run twice at once; both runs must pass, and `log` is that of the first."""
        with copy() as one, copy() as other:
            second = log.with_suffix(".second.log")
            with second.open("w", encoding="utf-8") as out:
                words = [*TEST, f"PYTHON={sys.executable}"]
                process = subprocess.Popen(words, cwd=other, stdout=out, stderr=subprocess.STDOUT)
                good = run((*TEST, f"PYTHON={sys.executable}"), log, one)
                return process.wait() == 0 and good

    def hogs(self, log: Path) -> bool:
        """Run beside two processes that use all the CPU time that they get."""
        with ExitStack() as stack:
            for _ in range(2):
                hog = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while 1: pass"]))
                stack.callback(hog.kill)
            return self.as_root(log, sys.executable)

    def in_debian(self, log: Path, suite: str, *through: str) -> bool:
        """Run in a Debian with Python, venv, make and git, as root, who installs the rest."""
        made = self.debian(suite)
        with tempfile.TemporaryDirectory(prefix="everywhere-", dir="/var/tmp") as name:
            root = Path(name) / "root"
            subprocess.run(["cp", "-a", "--reflink=auto", made, root], check=True)
            (root / "srv").mkdir(exist_ok=True)
            clone(root / "srv")
            subprocess.run(["chown", "-R", "root:root", root / "srv"], check=True)
            words = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTERS)
            shared = ("/etc/resolv.conf", *pips_paths())
            given = (*words, "sh", str(root), *shared, "--", *through, *TEST, "PYTHON=python3")
            return run(given, log, HERE)

    def debian(self, suite: str) -> Path:
        root, begun = self.roots / suite, self.roots / f"{suite}.begun"
        if not root.exists():
            subprocess.run([HERE / "tools" / "install-packages", "debootstrap"], check=True)
            shutil.rmtree(begun, ignore_errors=True)
            self.roots.mkdir(parents=True, exist_ok=True)
            words = ("--variant=minbase", f"--include={PACKAGES}", suite, str(begun))
            subprocess.run(["debootstrap", *words], check=True, stdout=subprocess.DEVNULL)
            begun.rename(root)
        return root


def python(version: str) -> str:
    """Return an interpreter of this version, of PATH or of pyenv."""
    found = shutil.which(f"python{version}")
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for each in (found, *map(str, kept)):
        if each and subprocess.run([each, "-V"], capture_output=True).returncode == 0:
            return each
    sys.exit(f"there is no Python {version}: leave that set-up out, or install it")


def pips_paths() -> set[str]:
    """Return the files and folders of pip's configuration, and its contents."""
    pip = (sys.executable, "-m", "pip", "config")
    words = ""
    for command in ("debug", "list"):
        words += subprocess.run([*pip, command], capture_output=True, text=True).stdout
    found = set(re.findall(r"(?:file://|['\s=])(/[^'\s,:]+)", words))
    return {each for each in found if Path(each).exists() and not each.startswith(str(Path.home()))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=1, metavar="N")
    parser.add_argument("--roots", type=Path, metavar="FOLDER")
    parser.add_argument("setups", nargs="*", metavar="SETUP")
    given = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("only root can make these set-ups")
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="everywhere-", dir="/var/tmp") as name:
        setups = Setups(given.roots or Path(name)).all
        unknown = set(given.setups) - set(setups)
        if unknown:
            sys.exit(f"no such set-up: {', '.join(unknown)}; there are {', '.join(setups)}")
        results = [
            once(each, setups[each], number)
            for number in range(given.times)
            for each in given.setups or setups
        ]
    print(f"\n{'set-up':<12}{'wall':>8}{'CPU':>8}  result")
    for one in results:
        print(f"{one.setup:<12}{one.wall_s:>7.0f}s{one.cpu_s:>7.0f}s  {one.last}")
    sys.exit(not all(one.good for one in results))


def once(name: str, setup: Callable[[Path], bool], number: int) -> Result:
    log = LOGS / f"{name}-{number + 1}.log"
    print(f"{name}: {log}", flush=True)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    good = setup(log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    summaries = re.findall(r"^=+ (.* in [\d.]+s.*?) =+$", log.read_text(errors="replace"), re.M)
    last = summaries[-1] if summaries else "no summary: see the log"
    print(f"{name}: {last}", flush=True)
    return Result(name, time.monotonic() - began, cpu_s, good, last)


if __name__ == "__main__":
    main()
