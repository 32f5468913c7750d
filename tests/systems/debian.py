"""Each Python of the Debian suites, in a system of its own made by debootstrap.

    make test-debian [DEBIAN_ROOTS=FOLDER]      (root, some minutes; the folder keeps the systems)

Not collected by itself: the name is no test's.  The project is installed from its wheels, once on
Debian's own packages and once on the pinned ones; the client library's tests run its workers there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.running import ROOT
from tests.systems.life import ELSEWHERE, Surroundings, lived

#: Version of Python by suite; sid has what it has.
SUITES = {"bookworm": "3.11", "trixie": "3.13", "sid": ""}
CLIENT_ONLY = {"bullseye": "3.9"}
PACKAGES = "python3-click,python3-daemon,python3-lockfile,python3-psutil,python3-rich"
PACKAGES = f"{PACKAGES},python3-prometheus-client"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")

pytestmark = [
    needs.ROOT,
    needs.programs("debootstrap"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="session")
def roots() -> Iterator[Path]:
    """Where the systems are; made anew and removed where no folder is named."""
    kept = os.environ.get("DEBIAN_ROOTS")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
        yield Path(kept).absolute()
        return
    with tempfile.TemporaryDirectory(prefix="debian-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def root_of(roots: Path) -> Callable[[str], Path]:
    """Return the root of a suite, made by debootstrap where it is not there."""

    def made(suite: str) -> Path:
        root, begun = roots / suite, roots / f"{suite}.begun"
        if not root.exists():
            shutil.rmtree(begun, ignore_errors=True)
            include = "python3,python3-venv" + ("" if suite in CLIENT_ONLY else f",{PACKAGES}")
            words = ("--variant=minbase", f"--include={include}", suite, str(begun))
            subprocess.run(["debootstrap", *words], check=True, stdout=subprocess.DEVNULL)
            begun.rename(root)
        return root

    return made


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own wheels, and those that a release is pinned to."""
    folder = tmp_path_factory.mktemp("wheels")
    pinned = str(ROOT / "requirements" / "release.txt")
    into = ("--no-deps", "--dest", str(folder), "--only-binary", ":all:")
    subprocess.run([*PIP, "download", *into, "--require-hashes", "-r", pinned], check=True)
    subprocess.run([*PIP, "download", *into, "prometheus-client"], check=True)
    ours = (str(ROOT / each) for each in ("client_lib", "exporter", "."))
    wheel = ("wheel", "--no-deps", "--wheel-dir", str(folder), *ours)
    subprocess.run([*PIP, *wheel], check=True)
    return folder


def inside(root: Path) -> tuple[str, ...]:
    return (*ELSEWHERE, f"--root={root}", "--")


def installed(root: Path, wheels: Path, *, own: bool) -> str:
    """Install the project in a system; return its Python there.  own: on Debian's packages."""
    place = "/opt/own" if own else "/opt/pinned"
    shutil.rmtree(f"{root}{place}", ignore_errors=True)
    system = ["--system-site-packages"] if own else []
    subprocess.run([*inside(root), "/usr/bin/python3", "-m", "venv", *system, place], check=True)
    words = ("install", "--quiet", "--no-index", "--find-links", str(wheels))
    given = [f"{place}/bin/pip", *words, "socketprotector[exporter]"]
    subprocess.run([*inside(root), *given], check=True)
    return f"{place}/bin/python"


def version_of(root: Path, python: str) -> str:
    script = "import sys; print('%d.%d' % sys.version_info[:2])"
    words = [*inside(root), python, "-c", script]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.mark.parametrize("packages", ["debian", "pinned"])
@pytest.mark.parametrize("suite", SUITES)
def test_a_whole_life_in(
    root_of: Callable[[str], Path],
    wheels: Path,
    tmp_path: Path,
    marked_environment: dict[str, str],
    suite: str,
    packages: str,
) -> None:
    """No process that is started may warn, nor may the compiler."""
    root = root_of(suite)
    python = installed(root, wheels, own=packages == "debian")
    version = version_of(root, python)
    print(f"{suite}: Python {version}")
    assert version == SUITES[suite] or not SUITES[suite]
    around = Surroundings(tmp_path, marked_environment, inside(root), (python, "-P"))
    folder = f"{os.path.dirname(os.path.dirname(python))}/lib/python{version}/site-packages"

    for package in ("socketprotector", "socketprotector_client", "socketprotector_exporter"):
        compiled = around.run("-q", "-f", f"{folder}/{package}", module="compileall")
        assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    told = around.run("--version", module="socketprotector_exporter")
    assert told.returncode == 0, told.stderr
    for mode in ("connection", "listener"):
        around.mode = mode
        lived(around)


@pytest.mark.parametrize("suite", [*CLIENT_ONLY, *SUITES])
def test_the_client_librarys_tests_with_workers_in(
    root_of: Callable[[str], Path], tmp_path: Path, suite: str
) -> None:
    root = root_of(suite)
    expected = {**CLIENT_ONLY, **SUITES}[suite]
    assert version_of(root, "/usr/bin/python3") == expected or not expected
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {" ".join(inside(root))} /usr/bin/python3 "$@"\n')
    python.chmod(0o755)

    # In a world of its own the run would see neither the system nor the script.
    words = [sys.executable, "-m", "pytest", "--shared-world"]
    done = subprocess.run(
        [*words, "-q", "-n", "2", str(ROOT / "tests" / "client")],
        cwd=ROOT,
        env={**os.environ, "WORKER_PYTHON": str(python), "TMPDIR": "/tmp"},
        stdout=subprocess.PIPE,
        check=False,
        text=True,
    )

    assert done.returncode == 0, done.stdout
