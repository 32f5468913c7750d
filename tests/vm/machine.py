"""Builds a Debian, boots it in an emulated machine, and hears what its tests say.

The processor is emulated (`-accel tcg`), so that it works where there is no virtualization, and
nothing of the host's kernel is used.  The built system is kept in SOCKETPROTECTOR_VM_CACHE.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.packages import debs
from tests.running import ROOT, Lines

from .catalogue import CHECKS, PACKAGED

#: One machine is waited for no longer; what it has not said by then has failed.
_LONGEST_S = 4 * 3600.0
NEEDED = ("qemu-system-x86_64", "debootstrap", "mkfs.ext4", "unshare", "chroot", "gcc")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class System:
    """One system that is tested: whose userland, and whose kernel."""

    name: str
    suite: str
    kernel: str  # the beginning of its version
    others: tuple[str, ...] = ()  # suites whose kernels are put beside its own
    #: Plain, because qemu 7.2 emulates newer ones so that Linux 6.12 does not come up on them; and
    #: without cmpxchg16b, after which an interrupt now and then finds garbage in the flags.
    processor: str = "Nehalem,-cx16"
    processors: int = 1
    #: It is another one each day: where it cannot be made or does not come up, that is said.
    changes: bool = False


SYSTEMS = (
    System("bookworm", "bookworm", "6.1.", ("bullseye",), processors=2),
    System("bookworm-on-5.10", "bookworm", "5.10.", ("bullseye",)),
    System("trixie", "trixie", "6.12."),
    System("sid", "sid", "", changes=True),
)


@dataclass
class Said:
    """What a machine has said."""

    system: dict[str, str] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    done: bool = False
    status: int | None = None  # qemu's exit status: 0 after an orderly power-off
    #: Why there are no checks: it could not be built or did not come up.
    trouble: str = ""
    took_s: float = 0.0


def missing() -> str:
    """Say what is missing here to run such a machine; an empty text if nothing is."""
    tools = [tool for tool in NEEDED if shutil.which(tool, path=_PATH) is None]
    if tools:
        return f"there is no {', no '.join(tools)} here"
    if os.getuid() != 0:
        return "only root can make a system with debootstrap"
    return ""


def cache() -> Path:
    told = os.environ.get("SOCKETPROTECTOR_VM_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(told) if told else Path(home, "socketprotector-vm")


def boot(system: System, wanted: Iterable[str]) -> Said:
    """Build the system, run the checks with these names, and return what they said."""
    names = list(CHECKS)
    numbers = ",".join(str(names.index(each)) for each in wanted)
    said = Said()
    began = time.monotonic()
    try:
        with disk(system, packaged=bool(PACKAGED.intersection(names))) as (root, image):
            _run(system, root, image, numbers, said)
    except (OSError, ValueError, AssertionError) as error:
        said.trouble = str(error)
    said.took_s = time.monotonic() - began
    return said


@contextmanager
def disk(system: System, *, packaged: bool) -> Iterator[tuple[Path, Path]]:
    """Build the system; yield its folder and an image of it, which goes with this.

    packaged: with the Debian packages on it, where they can be built.  Raises OSError, ValueError,
    AssertionError.
    """
    with _alone(cache()) as folder, tempfile.TemporaryDirectory(prefix="sp-vm-") as made:
        root, image, packages = folder / system.suite, Path(made, "disk"), Path(made, "packages")
        if packaged and not debs.missing():
            debs.build(Path(made, "built"))
            debs.versions(Path(made, "built"), packages)
        _tool("vm-root", root, system.suite, *system.others)
        _tool("vm-image", root, image, packages)
        yield root, image


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """One machine at a time: they share the built systems, and the host's processors."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _tool(name: str, *words: str | Path) -> None:
    """Run one of tools/; its own words go to the terminal.  Raises ValueError."""
    done = subprocess.run(
        [ROOT / "tools" / name, *words],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PATH": _PATH, "PYTHON": sys.executable},
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(f"{name} {done.returncode}: {done.stderr}")


def qemu(system: System, root: Path, image: Path, words: Iterable[str]) -> list[str]:
    """Return the command of its machine, whose second serial line is our stdin and stdout.

    words: for its kernel.  The console is in a file beside the image.  Raises ValueError.
    """
    kernels = sorted((root / "boot").glob(f"vmlinuz-{system.kernel}*"))
    if not kernels:
        raise ValueError(f"{system.suite} has no kernel {system.kernel}*")
    kernel = kernels[-1]
    initrd = kernel.with_name(kernel.name.replace("vmlinuz", "initrd.img"))
    all_words = [
        *("root=/dev/vda", "rw", "console=ttyS0", "quiet", "panic=-1"),
        # What guards a kernel against its processes is of no use here, and with an emulated
        # processor each system call would cost several times as much.
        *("mitigations=off", "audit=0", "apparmor=0"),
        *words,
    ]
    return [
        *("qemu-system-x86_64", "-accel", "tcg,tb-size=512", "-cpu", system.processor),
        *("-smp", str(system.processors), "-m", "1536", "-nodefaults"),
        *("-display", "none", "-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", " ".join(all_words)),
        *("-drive", f"file={image},format=raw,if=virtio,cache=unsafe"),
        *("-chardev", f"file,id=console,path={console(image)}", "-serial", "chardev:console"),
        *("-chardev", "stdio,id=said,signal=off", "-serial", "chardev:said"),
    ]


def console(image: Path) -> Path:
    """Return the file with what the machine of that image says on its console."""
    return image.with_name("console")


def _run(system: System, root: Path, image: Path, checks: str, said: Said) -> None:
    words = ("systemd.unit=tests.target", f"checks={checks}")
    receive, send = os.pipe()
    with subprocess.Popen(
        [*qemu(system, root, image, words), "-no-reboot"],
        stdin=subprocess.DEVNULL,
        stdout=send,
        stderr=subprocess.STDOUT,
    ) as machine:
        os.close(send)
        lines = Lines(receive)
        try:
            _hear(lines, said)
            if said.done:
                machine.wait(_LONGEST_S / 40)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            last = console(image).read_text(encoding="utf-8", errors="replace")[-8000:]
            said.trouble = f"{error}\n--- console ---\n{last}"
        finally:
            machine.kill()
            machine.wait()
            lines.join()
    said.status = machine.returncode


def _hear(lines: Lines, said: Said) -> None:
    """Take in one line after the other.  Raises AssertionError when no more come in time."""
    until = time.monotonic() + _LONGEST_S
    at = 0
    while not said.done:
        lines.wait_for("", after=at, deadline_s=until - time.monotonic())
        for line in list(lines.seen[at:]):
            at += 1
            _take(line, said)


def _take(line: str, said: Said) -> None:
    try:
        value = json.loads(line)
    except ValueError:
        print(f"the machine: {line}", flush=True)
        return
    if "system" in value:
        said.system = value["system"]
        print(f"\n  {said.system}", flush=True)
    elif "began" in value:
        print(f"  {value['began']}", flush=True)
    elif "saying" in value:
        print(f"    {value['saying']}", flush=True)
    elif "check" in value:
        said.checks[value["check"]] = value
        print(f"    {value['outcome']} in {value['took_s']} s", flush=True)
        if value["outcome"] == "failed":
            print(f"{value['said'][-1]}\n{value['journal']}", flush=True)
    elif "done" in value:
        said.done = True
