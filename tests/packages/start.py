"""The commands of docs/install.md on a Debian that has nothing yet.

    unshare --mount --pid --fork --mount-proc python -m tests.packages.start clean ROOT FOLDER

ROOT is a Debian without anything that the packages need; nothing is written into it.  FOLDER has
the packages.  Each command is the page's own; says how long those up to the broken release took.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import time
from pathlib import Path

from tests.packages import life
from tests.pages import page
from tests.running import ROOT as SOURCES

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
#: The numbers of the commands that start the protector, and that reload the broken release.
_START, _BROKEN = 3, 5


class Command:
    """A line of the page: what is run, its exit status, and what is said by its block."""

    def __init__(self, line: str, remark: str) -> None:
        self.line = line
        status = re.match(r"# exit status (\d+)", remark)
        self.status = int(status[1]) if status else 0
        self.shown: list[str] = []


def say_of_apt(root: Path) -> None:
    """Let apt-get there reach what it reaches here."""
    dumped = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, check=True)
    (root / "etc/apt/apt.conf.d/99here").write_bytes(dumped.stdout)
    for name in ("resolv.conf", "hosts"):
        shutil.copy(f"/etc/{name}", root / "etc")


def commands() -> list[Command]:
    """Return the commands of the page's section."""
    path = SOURCES / "docs" / "install.md"
    text = path.read_text(encoding="utf-8")
    at = text.index("### From a clean Debian")
    begins, ends = (text[:each].count("\n") for each in (at, text.index("\n## ", at)))
    found, latest = list[Command](), list[Command]()
    for block in page.blocks(path):
        if not begins < block.line < ends:
            continue
        if block.is_text:
            latest[-1].shown += block.text.strip().splitlines()
        else:
            lines = ["", *block.text.splitlines()]
            latest = [
                Command(line, before)
                for before, line in itertools.pairwise(lines)
                if not line.startswith("#")
            ]
            found += latest
    return found


def demo() -> None:
    """The demo beside that, by one who is not root and can write nowhere else."""
    as_nobody = ("/usr/sbin/chroot", "--userspec=65534:65534", str(life.ROOT))
    words = (*as_nobody, "SocketProtector", "demo", "--pause", "100ms")
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C"}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, flush=True)
    assert re.search(
        r"^[\d,]+ connections, 0 failed(, \d+ cut by our kill -9)?$", done.stdout, re.MULTILINE
    )
    assert not [*(life.ROOT / "tmp").glob("socketprotector*")]


def main() -> None:
    """Do what the page says."""
    life.mount(life.SYSTEM)
    say_of_apt(life.ROOT)
    for each in life.FOLDER.glob("*.deb"):
        shutil.copy(each, life.ROOT / "root")
    life.inside("apt-get", "update", "-qq")  # as it is where somebody works
    found = commands()
    assert len(found) > _BROKEN, found
    begun_s, heard = time.monotonic(), list[str]()
    for number, command in enumerate(found, 1):
        if number == 2:  # the network was for apt-get: no port is taken from others
            assert ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK) == 0
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        said = life.inside("sh", "-c", f"cd /root && {command.line}", status=command.status)
        heard += said.splitlines()
        for shown in command.shown:
            assert any(page.is_like(shown, line) for line in heard), shown
        if number == _BROKEN:
            took_s = time.monotonic() - begun_s
            print(f"a clean Debian, and a broken release not taken: {took_s:.0f} s", flush=True)
        if _START <= number < len(found):
            life.ask(8000)
        if number == _BROKEN:
            demo()
    print("LIVED", flush=True)


if __name__ == "__main__":
    main()
