"""Wheels and sdists: what is in them, that they are the same each time, and that they run.

`make packages` looks at them with the tools of others (published.py).
"""

from __future__ import annotations

import email
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.message import Message
from pathlib import Path

import click
import daemon as daemon_library
import psutil
import pytest

from tests import needs
from tests.c.building import alone_in, shared_folder
from tests.packages.dists import EPOCH, NAMES, PROJECT, SDISTS, VERSION, WHEELS, build
from tests.running import ROOT, Protector, ask

MAIN, CLIENT, EXPORTER = WHEELS
PROGRAMS = {
    *{"SocketProtector", "socketprotector", "socketprotectorctl", "SampleClient"},
}


@pytest.fixture(scope="module")
def dists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them, built once for all processes of `pytest -n`."""
    shared = shared_folder(tmp_path_factory)
    made, unfinished = shared / "dists", shared / "dists.new"
    with alone_in(shared):
        if not made.exists():
            build(ROOT, unfinished)
            unfinished.rename(made)
    return made


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def names_in(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return set(archive.getnames())


def metadata(wheel: Path) -> Message:
    [text] = [data for name, data in content(wheel).items() if name.endswith("/METADATA")]
    return email.message_from_bytes(text)


def tracked(*folders: str) -> set[str]:
    """The files that belong to the project, those not committed yet among them; no folders."""
    words = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.mark.costly
def test_they_are_the_same_built_elsewhere_and_from_the_sdists(dists: Path, tmp_path: Path) -> None:
    """What an sdist has is all that it takes; nothing of the machine gets into any of them."""
    for name in SDISTS:
        with tarfile.open(dists / name) as archive:
            # It came with Python 3.11.4, and 3.12 warns where there is none.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(tmp_path)
    project = tmp_path / f"socketprotector-{VERSION}"
    for own in ("client", "exporter"):
        folder = project / {"client": "client_lib"}.get(own, own)
        shutil.rmtree(folder)
        (tmp_path / f"socketprotector_{own}-{VERSION}").rename(folder)
    again = tmp_path / "again"

    build(project, again, umask=0o077, TZ="Pacific/Kiritimati", LC_ALL="C")

    assert {each.name for each in again.iterdir()} == set(NAMES)
    for name in WHEELS:
        assert (again / name).read_bytes() == (dists / name).read_bytes(), name


@pytest.mark.costly
@pytest.mark.parametrize("name", NAMES)
def test_times_are_those_given_and_owners_nobodys(dists: Path, name: str) -> None:
    if name.endswith(".whl"):
        with zipfile.ZipFile(dists / name) as archive:
            times = {each.date_time for each in archive.infolist()}
        assert times == {(2023, 11, 14, 22, 13, 20)}
        return
    with tarfile.open(dists / name) as archive:
        for each in archive.getmembers():
            found = (each.mtime, each.uid, each.gid, each.uname, each.gname)
            assert found == (int(EPOCH), 0, 0, "", ""), each.name


def test_the_wheel_has_one_package_with_the_sample_inside(dists: Path) -> None:
    found = content(dists / MAIN)
    about, data = f"socketprotector-{VERSION}.dist-info", f"socketprotector-{VERSION}.data"
    modules = {name for name in found if not name.startswith((f"{about}/", f"{data}/"))}

    sample = {f"socketprotector/{name}" for name in tracked("sample_client")}
    assert sample
    assert modules == tracked("socketprotector") | sample
    assert "socketprotector/py.typed" in modules
    pages = (ROOT / "docs" / "man").iterdir()
    shared = {f"man/man{path.suffix[1:]}/{path.name}" for path in pages}
    # What the documents say to copy from init.d/, for those who have no clone.
    shared |= {f"doc/socketprotector/examples/{Path(name).name}" for name in tracked("init.d")}
    assert "doc/socketprotector/examples/socketprotector@.service" in shared
    assert {name for name in found if name.startswith(f"{data}/")} == {
        f"{data}/data/share/{name}" for name in shared
    }


def test_the_wheel_of_the_client_has_its_package_and_no_more(dists: Path) -> None:
    about, data = (f"socketprotector_client-{VERSION}.{each}" for each in ("dist-info", "data"))
    found = content(dists / CLIENT)
    modules = {name for name in found if not name.startswith((f"{about}/", f"{data}/"))}

    assert [name for name in found if name.startswith(f"{data}/")] == [
        f"{data}/data/share/man/man1/socketprotector-run.1"
    ]
    folder = "client_lib/socketprotector_client"
    assert {f"client_lib/{name}" for name in modules} == tracked(folder)
    assert "socketprotector_client/py.typed" in modules


def test_the_wheel_of_the_exporter_has_its_package_and_what_operators_copy(dists: Path) -> None:
    about, data = (f"socketprotector_exporter-{VERSION}.{e}" for e in ("dist-info", "data"))
    found = content(dists / EXPORTER)
    modules = {name for name in found if not name.startswith((f"{about}/", f"{data}/"))}

    assert {f"exporter/{name}" for name in modules} == tracked("exporter/socketprotector_exporter")
    assert {"socketprotector_exporter/py.typed", "socketprotector_exporter/page/page.js"} < modules
    shared = {f"doc/socketprotector/examples/{Path(n).name}" for n in tracked("exporter/init.d")}
    assert "doc/socketprotector/examples/prometheus-rules.yml" in shared
    assert {name for name in found if name.startswith(f"{data}/")} == {
        f"{data}/data/share/{name}" for name in (*shared, "man/man8/socketprotector-exporter.8")
    }


def test_the_exporter_is_in_its_own_wheel_alone(dists: Path) -> None:
    """Of the supervisor's one only the extras name it, which bring it."""
    assert not [name for name in content(dists / MAIN) if "exporter" in name]
    needs = metadata(dists / MAIN).get_all("Requires-Dist", [])
    elsewhere = [each for each in needs if re.match("prometheus|starlette|uvicorn", each)]
    assert all("extra == 'dev'" in each for each in elsewhere)
    for extra, wanted in (("exporter", ""), ("web", "[web]")):
        name = f"socketprotector-exporter{wanted}=={VERSION}"
        assert f"{name}; extra == '{extra}'" in needs
    assert f"socketprotector=={VERSION}" in metadata(dists / EXPORTER).get_all("Requires-Dist", [])


def test_the_programs_are_there_under_their_names_of_old_and_in_lower_case(dists: Path) -> None:
    found: dict[str, str] = {}
    for name in WHEELS:
        [text] = [d for n, d in content(dists / name).items() if n.endswith("/entry_points.txt")]
        parser = ConfigParser()
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read_string(text.decode())
        found |= dict(parser["console_scripts"])

    assert set(found) == PROGRAMS | {"socketprotector-run", "socketprotector-exporter"}
    assert found["socketprotector"] == found["SocketProtector"]


def test_the_sdists_have_all_that_the_repository_has(dists: Path) -> None:
    main, *others = (names_in(dists / name) for name in SDISTS)

    wanted = {n for n in tracked() if not n.startswith((".ci/", ".github/"))}
    top = f"socketprotector-{VERSION}"
    assert main == {f"{top}/{name}" for name in (*wanted, "PKG-INFO")}
    for found, folder in zip(others, ("client_lib", "exporter"), strict=True):
        top = f"socketprotector_{folder.removesuffix('_lib')}-{VERSION}"
        wanted = {name.removeprefix(f"{folder}/") for name in tracked(folder)}
        # Which hatchling needs for leaving out what is ignored.
        assert found - {f"{top}/.gitignore"} == {f"{top}/{n}" for n in (*wanted, "PKG-INFO")}


@pytest.mark.parametrize("name", WHEELS)
def test_each_link_of_the_long_description_leads_to_a_file_of_this_version(
    dists: Path, name: str
) -> None:
    about = metadata(dists / name)
    links = re.findall(r"\]\(([^)\s]+)\)", str(about.get_payload()))
    source = f"{PROJECT['urls']['Source']}/blob/v{VERSION}/"

    assert about["Description-Content-Type"] == "text/markdown"
    # That of the exporter names its documents without links.
    assert name == EXPORTER or any(each.startswith(source) for each in links)
    for each in links:
        assert each.startswith(("https://", "#")), each
        if each.startswith(source):
            path = each.removeprefix(source).partition("#")[0]
            assert (ROOT / path).exists(), each


def test_the_links_of_the_repository_stay_relative() -> None:
    for page in ("README.md", "client_lib/README.md", "exporter/README.md"):
        assert PROJECT["urls"]["Source"] not in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.costly
def test_installed_they_serve_and_uninstalled_nothing_is_left(
    dists: Path, tmp_path: Path, marked_environment: dict[str, str]
) -> None:
    venv = tmp_path / "venv"
    words = ("-m", "venv", "--without-pip", str(venv))
    subprocess.run([sys.executable, *words], check=True)
    before = files(venv)
    python = str(venv / "bin" / "python")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    wheels = [str(dists / name) for name in (MAIN, CLIENT)]  # without the exporter
    install = ("install", "--quiet", "--no-index", "--no-deps", "--no-compile", *wheels)
    subprocess.run([*pip, *install], check=True)
    # What they need is taken from here; they themselves are not there, which are editable here.
    elsewhere = {
        str(Path(str(each.__file__)).parents[1]) for each in (click, daemon_library, psutil)
    }
    environment = {
        **marked_environment,
        "PYTHONPATH": ":".join(elsewhere),
        "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled"),
    }

    programs = {each.name for each in (venv / "bin").iterdir()}
    assert programs >= PROGRAMS | {"socketprotector-run"}
    assert "socketprotector-exporter" not in programs
    for program in ("socketprotector", "socketprotectorctl"):
        done = subprocess.run(
            [venv / "bin" / program, "--version"],
            env={**os.environ, **environment},
            capture_output=True,
            check=True,
            text=True,
        )
        assert VERSION in done.stdout
    sample = str(venv / "bin" / "SampleClient")
    daemon = Protector(
        ["127.0.0.1:0", "--", sample, "0"],
        environment,
        command=(str(venv / "bin/socketprotector"),),
    )
    try:
        assert re.fullmatch(r"\[\d+\] hello", ask(("127.0.0.1", daemon.ready().port)))
        daemon.reload()
        where = "import socketprotector as p, socketprotector_client as c; print(p, c)"
        told = subprocess.run(
            [python, "-P", "-c", where],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert told.stdout.count(str(venv)) == 2, told
        daemon.stop()
    finally:
        daemon.end()

    names = ("socketprotector", "socketprotector-client")
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *names], check=True)
    assert files(venv) == before


def files(folder: Path) -> set[str]:
    return {str(each) for each in folder.rglob("*") if not each.is_dir()}


def test_the_profile_of_apparmor_holds_under_each_name_of_the_program() -> None:
    """One that is not named would run unconfined."""
    text = (ROOT / "init.d" / "apparmor").read_text(encoding="utf-8")
    names = sorted(n for n, main in PROJECT["scripts"].items() if "protector.__main__:" in main)

    attached = re.search(r"^profile socketprotector @{SOCKETPROTECTOR}/bin/{(.*?)} ", text, re.M)
    assert attached
    assert attached[1].split(",") == names == ["SocketProtector", "socketprotector"]


def test_a_release_is_one_version_everywhere() -> None:
    """What the release workflow asks before it builds anything."""
    source = PROJECT["urls"]["Source"]
    check = [sys.executable, str(ROOT / "tools" / "release_check.py")]

    def told(*words: str) -> list[str]:
        done = subprocess.run([*check, *words], capture_output=True, text=True)
        assert done.returncode == (1 if done.stderr else 0)
        return [line for line in done.stderr.splitlines() if "CHANGELOG" not in line]

    assert told(f"v{VERSION}", source) == []
    assert len(told(f"v{VERSION}", f"{source}-fork")) == 3
    # Each distribution's, two packages', what they need of each other (1, 2 by extras, 1), and the
    # files of Debian, rpm and Arch.
    assert len(told("v99.0", source)) == 12


def test_the_repository_has_one_address() -> None:
    """Formats that cannot refer to pyproject.toml have it written out; no other file does."""
    source = PROJECT["urls"]["Source"]
    host, _, name = source.rsplit("/", 2)
    written = re.compile(rf"{re.escape(host)}/[\w.-]+/{name}\b")
    found = {
        path: set(written.findall((ROOT / path).read_text(encoding="utf-8", errors="ignore")))
        for path in tracked()
    }

    assert {path: names for path, names in found.items() if names} == {
        path: {source}
        for path in (
            *("pyproject.toml", "client_lib/pyproject.toml", "exporter/pyproject.toml"),
            "packaging/Containerfile",
            *("packaging/arch/PKGBUILD", "packaging/debian/control"),
            "packaging/rpm/socketprotector.spec",
        )
    }


def test_a_clone_finds_the_sample_where_an_installed_one_does() -> None:
    assert (ROOT / "socketprotector" / "sample_client").readlink() == Path("../sample_client")


def test_a_release_installs_only_what_has_a_hash_and_uploads_before_it_runs_anything() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    installs = [line for line in text.splitlines() if "pip install" in line]

    assert len(installs) == 3
    assert all("--require-hashes" in line or "--no-index --no-deps" in line for line in installs)
    assert text.index("upload-artifact@") < text.index("dist/*.whl")


def test_a_release_needs_the_upgrade_and_the_downgrade_under_load() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    compatible, _, build = text.partition("\n  compatible:\n")[2].partition("\n  build:\n")
    publish = build.partition("\n  publish:\n")[2]

    needed = ["tests/scenarios/test_release_before.py", "tests/scenarios/test_upgrade_from.py"]
    assert f"pytest -v {' '.join(needed)}\n" in compatible
    assert all((ROOT / each).exists() for each in needed)
    assert build.startswith("    needs: [check, compatible]\n")
    assert "\n  check:\n" in text
    assert "    uses: $/.github/workflows/check.yml\n" in text
    assert publish.startswith("    needs: build\n")


def test_a_workflow_makes_what_the_makefile_has() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = [each.read_text() for each in (ROOT / ".github" / "workflows").glob("*.yml")]
    made = {each for text in texts for each in re.findall(r"run: (?:sudo )?make ([\w-]+)", text)}

    assert made == {"docs", "install", "lint", "test", "test-tools"}
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in made)


def test_an_image_has_no_unpinned_part() -> None:
    text = (ROOT / "packaging" / "Containerfile").read_text(encoding="utf-8")
    joined = text.replace("\\\n", " ")
    installs = [each for each in joined.split("&&") if "pip install" in each]

    (base, *others) = re.findall(r"(?m)^FROM (.*)", text)
    assert re.fullmatch(r"docker\.io/\S+:\S+@sha256:[0-9a-f]{64} AS base", base)
    assert others == ["base AS build", "base"]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0]
    assert "--no-index --no-deps /wheels/socketprotector*.whl" in installs[1]
    for name in ("release", "exporter"):
        pinned = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
        for part in re.split(r"\n(?=[a-z])", re.sub(r"^#.*\n", "", pinned, flags=re.M)):
            assert "--hash=sha256:" in part, part


def test_the_example_for_compose_asks_for_nothing_that_the_image_does_not_take() -> None:
    example = (ROOT / "packaging" / "compose.yaml").read_text(encoding="utf-8")
    image = (ROOT / "packaging" / "Containerfile").read_text(encoding="utf-8")

    asked = re.findall(r"\$\{?(\w+)", example)
    assert set(asked) <= set(re.findall(r"(?m)^ARG (\w+)", image))


def test_the_profile_of_apparmor_lets_no_worker_replace_another_service_s_pid_file() -> None:
    text = (ROOT / "init.d" / "apparmor").read_text(encoding="utf-8")

    written = [line for line in text.splitlines() if re.match(r" +\S*run/\S* \S*w", line)]
    assert written
    assert all(re.search("run/(socketprotector|systemd)/", line) for line in written), written


def test_pictures_of_a_packaged_page_are_on_the_web(tmp_path: Path) -> None:
    for page in ("README.md", "docs/metrics.md"):
        copied = tmp_path / Path(page).name
        shutil.copy(ROOT / page, copied)
        subprocess.run([ROOT / "packaging" / "link-pictures", copied], check=True)
        links = re.findall(r"\]\((\S*images/\S+)\)", copied.read_text(encoding="utf-8"))
        assert links
        for link in links:
            base, _, name = link.partition("/raw/main/")
            assert base == PROJECT["urls"]["Source"]
            assert (ROOT / name).is_file()


def upgrade_running(folder: Path, tools: dict[str, str], *words: str) -> str:
    """Run the packages' script on a folder's sockets, with the test's programs; return stderr."""
    own = folder / "tools"
    own.mkdir()
    for name, text in tools.items():
        (own / name).write_text(f"#!/bin/sh\n{text}\n")
        (own / name).chmod(0o755)
    script = (ROOT / "packaging" / "upgrade-running").read_text(encoding="utf-8")
    for there in ("/run/socketprotector", "/run/user", "/usr/sbin/policy-rc.d"):
        script = script.replace(there, str(folder / ("run" if "protector" in there else "no")))
    done = subprocess.run(
        ["sh", "-c", script, "upgrade-running", *words],
        env={**os.environ, "PATH": f"{own}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stderr


def make_socket(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def test_an_instance_that_hangs_holds_up_no_upgrade_of_the_package(tmp_path: Path) -> None:
    """Nor those behind it: each has a time limit.  Here timeout(1) says at once that it is over."""
    run, asked = tmp_path / "run", tmp_path / "asked"
    for name in ("bad", "good"):
        make_socket(run / f"{name}.control")
    tools = {
        "socketprotectorctl": f'echo "$2" >>{asked}; case $2 in *bad*) exec sleep 600 ;; esac',
        "timeout": 'shift 2; case "$*" in *bad*) exit 124 ;; esac; exec "$@"',
    }

    told = upgrade_running(tmp_path, tools)

    assert asked.read_text() == f"{run}/good.control\n"
    assert f"warning: the protector at {run}/bad.control goes on" in told
    assert "good" not in told


@needs.ANOTHER_USER
@pytest.mark.parametrize("owner", ["of the socket", "another"])
def test_root_is_advised_to_signal_only_a_process_of_the_sockets_owner(
    tmp_path: Path, owner: str
) -> None:
    """A false protector says another service's number."""
    path = tmp_path / "run" / "web.control"
    make_socket(path)
    if owner == "another":
        os.chown(path, 65534, -1)
    tools = {"socketprotectorctl": f"echo 'web: serving, pid {os.getpid()}, version 0.9.0'"}

    told = upgrade_running(tmp_path, tools, "--removed")

    assert f"warning: the protector at {path}" in told
    assert (f"kill -TERM {os.getpid()}" in told) == (owner == "of the socket")


@pytest.mark.parametrize("unit", ["exporter", "page"])
def test_the_exporter_is_not_root_and_its_memory_has_a_limit(unit: str) -> None:
    text = (ROOT / "exporter" / "init.d" / f"socketprotector-{unit}.service").read_text(
        encoding="utf-8"
    )

    for line in (
        *("DynamicUser=yes", "SupplementaryGroups=socketprotector-status"),
        *("CapabilityBoundingSet=", "UnsetEnvironment=PYTHONPATH PYTHONHOME"),
    ):
        assert f"\n{line}\n" in text
    assert re.search(r"^MemoryMax=\d+M$", text, re.M)
