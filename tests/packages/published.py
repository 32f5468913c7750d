"""What is published, as the tools of an index and of its users see it.

    make packages      (asks the package index that pip is set up for; a minute)

Not collected by itself: the name is no test's.  The tools are those of packaging/requirements.txt,
in an environment of their own (PACKAGING_TOOLS).
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import needs
from tests.packages.dists import EPOCH, NAMES, VERSION, WHEELS, build
from tests.running import ROOT, Protector, ask, output_of

TOOLS = Path(os.environ.get("PACKAGING_TOOLS", ROOT / ".venv" / "packaging")) / "bin"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")

WORKFLOWS = pytest.mark.parametrize(
    "file", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda file: file.name
)

pytestmark = [
    needs.unless(TOOLS.is_dir(), f"the tools in {TOOLS}"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def dists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dists")
    build(ROOT, folder)
    return folder


def test_twine_finds_nothing(dists: Path) -> None:
    told = output_of(TOOLS / "twine", "check", "--strict", *(dists / name for name in NAMES))

    assert told.count("PASSED") == len(NAMES), told


def test_check_wheel_contents_finds_nothing(dists: Path) -> None:
    told = output_of(TOOLS / "check-wheel-contents", *(dists / name for name in WHEELS))

    assert told.count("OK") == len(WHEELS), told


@WORKFLOWS
def test_a_workflow_is_one_that_github_understands(file: Path) -> None:
    output_of(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", file)


@WORKFLOWS
def test_a_workflow_gives_no_more_away_than_it_has_to(file: Path) -> None:
    """By zizmor: rights, credentials, injected text, and actions that are pinned to a commit."""
    told = output_of(TOOLS / "zizmor", "--offline", "--no-progress", "--color=never", file)

    assert "No findings to report" in told, told


def test_the_example_is_one_that_compose_understands() -> None:
    file = ROOT / "packaging" / "compose.yaml"
    output_of(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)


def test_build_makes_the_same_from_the_sdists(dists: Path, tmp_path: Path) -> None:
    """As an index's users build them: each in an environment that has the backend alone."""
    for folder in (ROOT, ROOT / "client_lib", ROOT / "exporter"):
        words = ("--outdir", tmp_path, "--no-isolation", folder)
        output_of(TOOLS / "python", "-m", "build", *words, SOURCE_DATE_EPOCH=EPOCH)

    for name in WHEELS:
        assert (tmp_path / name).read_bytes() == (dists / name).read_bytes(), name


@pytest.fixture(scope="module")
def needed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels that a release is pinned to, and pip, which pipx asks for."""
    folder = tmp_path_factory.mktemp("needed")
    pinned = str(ROOT / "requirements" / "release.txt")
    into = ("--no-deps", "--dest", str(folder), "--only-binary", ":all:")
    output_of(*PIP, "download", *into, "--require-hashes", "-r", pinned)
    output_of(*PIP, "download", *into, "pip")
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def index(dists: Path, needed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An index with each distribution and what they need, as once they are published."""
    root = tmp_path_factory.mktemp("index")
    for file in (*needed.iterdir(), *dists.iterdir()):
        # PEP 503: a folder for each project, by its normalized name.
        name = re.sub(r"[-_.]+", "-", file.name.partition("-")[0]).lower()
        folder = root / "simple" / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)
    handler = functools.partial(_Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/simple/"
        server.shutdown()
        thread.join()


@pytest.fixture
def no_other_index(tmp_path: Path, index: str) -> dict[str, str]:
    """An environment in which uv and pip know this index alone, and keep all below tmp_path."""
    return {
        "HOME": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_INDEX_URL": index,
        "PIPX_HOME": str(tmp_path / "pipx"),
        "PIPX_BIN_DIR": str(tmp_path / "bin"),
        "PIPX_DEFAULT_BACKEND": "pip",
        "UV_CACHE_DIR": str(tmp_path / "uv"),
        "UV_DEFAULT_INDEX": index,
        "UV_NO_CONFIG": "1",
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_TOOL_BIN_DIR": str(tmp_path / "bin"),
        "UV_TOOL_DIR": str(tmp_path / "tools"),
    }


def served(command: Sequence[str], sample: str, environment: dict[str, str]) -> None:
    """A client is served by the sample under a protector that a command starts."""
    daemon = Protector(["127.0.0.1:0", "--", sample, "0"], environment, command=command)
    try:
        assert re.fullmatch(r"\[\d+\] hello", ask(("127.0.0.1", daemon.ready().port)))
        daemon.reload()
        daemon.stop()
    finally:
        daemon.end()


def test_uv_runs_it_from_the_wheel(
    dists: Path, tmp_path: Path, no_other_index: dict[str, str]
) -> None:
    main, client, _ = (str(dists / name) for name in WHEELS)
    words = ("tool", "run", "--python", sys.executable, "--with", client, "--from", main)

    told = output_of(TOOLS / "uv", *words, "socketprotector", "--version", **no_other_index)

    assert VERSION in told


def test_uvx_runs_it_by_its_name(
    no_other_index: dict[str, str], marked_environment: dict[str, str]
) -> None:
    uvx = (str(TOOLS / "uvx"), "--quiet", "--python", sys.executable)
    told = output_of(
        *uvx, "--from", "socketprotector", "socketprotectorctl", "--version", **no_other_index
    )
    assert VERSION in told
    told = output_of(*uvx, "socketprotector", "--help", **no_other_index)
    assert "LISTEN" in told


def test_uvx_shows_the_demo(no_other_index: dict[str, str]) -> None:
    uvx = (str(TOOLS / "uvx"), "--quiet", "--python", sys.executable)
    told = output_of(*uvx, "socketprotector", "demo", "--pause", "100ms", **no_other_index)

    assert re.search(
        r"^[\d,]+ connections, 0 failed(, \d+ cut by our kill -9)?$", told, re.MULTILINE
    ), told


def test_uv_installs_it_and_takes_it_away(
    tmp_path: Path, no_other_index: dict[str, str], marked_environment: dict[str, str]
) -> None:
    uv, folder = str(TOOLS / "uv"), tmp_path / "bin"
    output_of(
        uv, "tool", "install", "--python", sys.executable, "socketprotector", **no_other_index
    )
    served((str(folder / "socketprotector"),), str(folder / "SampleClient"), marked_environment)
    output_of(uv, "tool", "uninstall", "socketprotector", **no_other_index)

    assert not [*folder.iterdir()]


def test_pipx_installs_it_and_takes_it_away(
    tmp_path: Path, no_other_index: dict[str, str], marked_environment: dict[str, str]
) -> None:
    pipx, folder = str(TOOLS / "pipx"), tmp_path / "bin"
    output_of(pipx, "install", "--python", sys.executable, "socketprotector", **no_other_index)
    served((str(folder / "socketprotector"),), str(folder / "SampleClient"), marked_environment)
    output_of(pipx, "uninstall", "socketprotector", **no_other_index)

    assert not [*folder.iterdir()]


def test_pip_installs_both_into_a_fresh_environment_and_takes_them_away(
    tmp_path: Path, no_other_index: dict[str, str], marked_environment: dict[str, str]
) -> None:
    venv = tmp_path / "venv"
    output_of(sys.executable, "-m", "venv", venv)
    python, programs = str(venv / "bin" / "python"), venv / "bin"
    output_of(python, "-m", "pip", "install", "--quiet", "socketprotector", **no_other_index)
    assert "No broken" in output_of(python, "-m", "pip", "check", **no_other_index)
    served((str(programs / "SocketProtector"),), str(programs / "SampleClient"), marked_environment)
    names = ("socketprotector", "socketprotector-client")
    output_of(python, "-m", "pip", "uninstall", "--quiet", "--yes", *names, **no_other_index)

    left = [
        each for each in venv.rglob("*") if re.search("socketprotector|sample", each.name, re.I)
    ]
    # pip removes a folder that it has emptied, and not the one around that.
    assert not [each for each in left if not each.is_dir() or any(each.iterdir())]
