"""Compiles the C programs of the tests, once for all processes that pytest runs in."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import needs
from tests.running import ROOT

EXAMPLES = ROOT / "client_lib" / "c" / "examples"
SOURCES = {
    "echo_blocking": EXAMPLES / "echo_blocking.c",
    "echo_epoll": EXAMPLES / "echo_epoll.c",
    "probe": Path(__file__).parent / "probe.c",
}
#: Those that have nothing to do with the client for C.
OTHERS = {"original": ROOT / "tests" / "legacy" / "original.c"}
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic")
#: Any fault, leaks included, ends the program with a status that is not 0.
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PLAIN = ("-O2", "-g")

#: Returns the path of a program: build("probe", *flags).
Build = Callable[..., Path]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Be the only process that works there."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of one pytest run share, and no other run."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "c"
    folder.mkdir(exist_ok=True)
    return folder


def installed(tool: str) -> str:
    """Return the path of a tool, or skip; `make test` installs what it can."""
    path = shutil.which(tool)
    if path is None:
        needs.skip(tool)
    return path


def working_valgrind() -> str:
    """Return the path of valgrind, or skip; it needs the C library's symbols (libc6-dbg)."""
    path = installed("valgrind")
    if subprocess.run([path, "-q", shutil.which("true") or "true"], check=False).returncode:
        needs.skip("valgrind and libc6-dbg")
    return path


def compiled(folder: Path, name: str, *flags: str) -> Path:
    """Return the program, compiled as C99 by gcc if it is not there yet."""
    gcc = installed("gcc")
    with alone_in(folder):
        source = {**SOURCES, **OTHERS}[name]
        binary = folder / "-".join([name, *(flag.strip("-").replace("=", "-") for flag in flags)])
        if not binary.exists():
            new = binary.with_suffix(".new")
            command: list[str | Path] = [gcc, "-std=c99", *STRICT, *flags, "-o", new, source]
            subprocess.run(command, check=True)
            new.rename(binary)
    return binary
