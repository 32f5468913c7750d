"""What the rivals take: installed by name, or the reason why it cannot be."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.processes import HERE, ROOT, CannotMeasure, built
from bench.rivals.catalogue import Rival

PROGRAMS = Path(__file__).parent / "programs"
#: Where the rivals from PyPI are.
VENV = ROOT / ".venv" / "rivals"
#: The processes that belong to no rival: generators, proxies, commands.
helpers: set[int] = set()


@contextmanager
def helping(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Let a process of this run count as no rival's, and end it."""
    helpers.add(process.pid)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        helpers.discard(process.pid)


def run(command: str, **more: str) -> str:
    """Run a command that ends; return what it printed.  Raises CannotMeasure."""
    try:
        with helping(
            subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **more},
            )
        ) as process:
            said = process.communicate(timeout=300)[0].decode(errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotMeasure(f"`{command}`: {error}") from error
    if process.returncode:
        last = (said.strip().splitlines() or ["no words"])[-1]
        raise CannotMeasure(f"`{command}`: {last}")
    return said


def version(rival: Rival) -> str:
    """Return the version of a rival that is installed.  Raises CannotMeasure."""
    python = str(VENV / "bin" / "python") if rival.pip else sys.executable
    scripts, tools = VENV / "bin", sysconfig.get_path("scripts")
    said = run(rival.version.format(python=python, scripts=scripts, tools=tools))
    found = re.search(r"\d+(\.\w+)+|\b\d+\b", said)
    return found[0] if found else "-"


def install(rival: Rival) -> None:
    """Install what a rival takes, if it is not there.  Raises CannotMeasure."""
    try:
        version(rival)
    except CannotMeasure:
        if rival.debian:
            run(f"tools/install-packages {' '.join(rival.debian)}")
        if rival.pip:
            if not VENV.exists():
                run(f"{sys.executable} -m venv {VENV}")
            pip = f"{VENV}/bin/pip install --quiet --disable-pip-version-check"
            run(f"{pip} {' '.join(rival.pip)}")
    if "{built}/flips" in rival.command:
        flips, source = HERE / "flips", PROGRAMS / "flips.go"
        if not flips.exists() or flips.stat().st_mtime < source.stat().st_mtime:
            run(f"go build -o {flips} {source}", GO111MODULE="off", GOPATH="/usr/share/gocode")
    for name in ("answer", "serve", "least"):
        if f"{{built}}/{name}" in rival.at_path:
            built(name)
