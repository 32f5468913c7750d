"""The Debian packages: built, looked at by lintian, and lived with on Debian 12 and 13.

    make packages [DEBIAN_ROOTS=FOLDER]     (root; some minutes; the folder keeps the systems)

Not collected by itself: the name is no test's.  They are built once, on Debian 12 or later.
"""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.packages import debs
from tests.packages.debian_roots import debian_roots
from tests.packages.debs import COMPLETED, run
from tests.packages.dists import VERSION
from tests.running import DEADLINE_S, ROOT

#: Suites, with the version of their Python.
SUITES = {"bookworm": "3.11", "trixie": "3.13"}
PACKAGES = ("socketprotector", "socketprotector-exporter", "python3-socketprotector-client")
NAMESPACES = ("--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")

pytestmark = [
    needs.unless(not debs.missing(), "packages that build Debian's", debs.missing()),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, as they are built from these sources."""
    folder = tmp_path_factory.mktemp("deb")
    debs.build(folder)
    return folder


@pytest.fixture(scope="session")
def packages(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of packages, as debs.versions() makes them."""
    folder = tmp_path_factory.mktemp("packages")
    debs.versions(built, folder)
    return folder


@needs.programs("lintian")
def test_lintian_has_neither_errors_nor_warnings(built: Path) -> None:
    [changes] = built.glob("*.changes")
    words = ("--profile", "debian", "--fail-on", "error,warning", "--allow-root")

    told = run("lintian", *words, changes)

    assert not told.strip(), told


def test_every_override_is_needed(built: Path) -> None:
    [changes] = built.glob("*.changes")
    told = run("lintian", "--profile", "debian", "--allow-root", "--show-overrides", changes)

    assert "unused-override" not in told
    for name in PACKAGES:
        file = ROOT / "packaging" / "debian" / f"{name}.lintian-overrides"
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                tag = line.split()[1]
                assert f"O: {name}: {tag}" in told, line


def test_they_have_what_an_operator_looks_for(built: Path) -> None:
    main, exporter, client = (next(built.glob(f"{name}_*.deb")) for name in PACKAGES)
    names, others = (
        {line.split()[5] for line in run("dpkg-deb", "-c", each).splitlines()}
        for each in (main, exporter)
    )

    units = {path.name for path in (ROOT / "init.d").glob("*.s[oe][cr]*")}
    assert "socketprotector@.socket" in units
    completed = {line.split()[0] for line in COMPLETED} - {"socketprotector-exporter"}
    examples = ("apparmor", "example.toml")
    for each in (
        *("/etc/init.d/socketprotector", "/etc/logrotate.d/socketprotector"),
        "/etc/needrestart/conf.d/socketprotector.conf",
        *(f"/usr/lib/systemd/system/{name}" for name in units),
        *(f"/usr/share/doc/socketprotector/examples/{name}" for name in examples),
        *(f"/usr/share/bash-completion/completions/{n}" for n in completed),
        *(f"/usr/share/zsh/vendor-completions/_{n}" for n in completed),
        *(f"/usr/share/fish/vendor_completions.d/{n}.fish" for n in completed),
        "/usr/share/man/man8/SocketProtector.8.gz",
        *(f"/usr/share/man/man1/{n}.1.gz" for n in ("SampleClient", "socketprotectorctl")),
        *(f"/usr/bin/{n}" for n in ("SocketProtector", "socketprotector", "SampleClient")),
    ):
        assert f".{each}" in names, each
    assert not [name for name in names if "exporter" in name or name.endswith("page.service")]
    for each in (
        *("/usr/bin/socketprotector-exporter", "/usr/share/man/man8/socketprotector-exporter.8.gz"),
        *(f"/usr/lib/systemd/system/socketprotector-{n}.service" for n in ("exporter", "page")),
        "/usr/share/doc/socketprotector-exporter/examples/prometheus-rules.yml",
        "/usr/share/bash-completion/completions/socketprotector-exporter",
        "/usr/share/zsh/vendor-completions/_socketprotector-exporter",
        "/usr/share/fish/vendor_completions.d/socketprotector-exporter.fish",
    ):
        assert f".{each}" in others, each
    told = run("dpkg-deb", "-f", exporter, "Depends")
    assert f"socketprotector (= {VERSION}-1)" in told
    assert "python3-prometheus-client" in told
    assert "python3-socketprotector" not in told
    assert not [name for name in names | others if "site-packages" in name or name.endswith(".pyc")]
    told = run("dpkg-deb", "-f", main, "Depends")
    assert f"python3-socketprotector-client (= {VERSION}-1)" in told
    assert "python3 (>= 3.11)" in told
    for name in ("click", "daemon", "lockfile", "psutil", "rich"):
        assert f"python3-{name}" in told
    assert "./usr/bin/socketprotector-run" in run("dpkg-deb", "-c", client)


@needs.programs("zsh")
def test_zsh_completes_at_the_first_tab(built: Path, tmp_path: Path) -> None:
    for name in PACKAGES[:2]:
        run("dpkg-deb", "-x", next(built.glob(f"{name}_*.deb")), tmp_path / "root")
    folder = tmp_path / "root" / "usr" / "share" / "zsh" / "vendor-completions"
    settings = f"fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -D; PS1='at> '\n"
    (tmp_path / ".zshrc").write_text(settings)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"ZDOTDIR": str(tmp_path), "TERM": "vt100", "HOME": str(tmp_path), "PATH": path}
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["zsh", "-d", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as shell:
        os.close(theirs)
        try:
            shown(ours, b"at> ")
            for begun, word in {
                **COMPLETED,
                "SocketProtector --log-level=w": "level=warning",
            }.items():
                os.write(ours, f"{begun}\t".encode())
                shown(ours, word.encode())
                os.write(ours, b"\x15")
        finally:
            shell.kill()
            os.close(ours)


@needs.programs("fish")
def test_fish_completes(built: Path, tmp_path: Path) -> None:
    for name in PACKAGES[:2]:
        run("dpkg-deb", "-x", next(built.glob(f"{name}_*.deb")), tmp_path / "root")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        "HOME": str(tmp_path),
        "TERM": "dumb",
        "PATH": path,
        "LANG": "C.UTF-8",
        "XDG_DATA_DIRS": f"{tmp_path}/root/usr/share:/usr/share",
    }

    def completed(words: str) -> list[str]:
        done = subprocess.run(
            ["fish", "--command", f"complete --do-complete '{words}'"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=True,
            text=True,
        )
        return [line.partition("\t")[0] for line in done.stdout.splitlines()]

    for begun, word in COMPLETED.items():
        assert completed(begun) == [word]
    assert completed("socketprotectorctl rel") == ["release", "releases", "reload"]
    assert completed(f"SocketProtector --config {tmp_path}/ro") == [f"{tmp_path}/root/"]
    assert completed("SocketProtector --log-level=w") == ["--log-level=warning"]
    assert "--dry-run" in completed("socketprotectorctl reload --d")


def shown(terminal: int, text: bytes) -> None:
    """Wait until a terminal shows a text."""
    seen = b""
    while text not in seen:
        assert select.select([terminal], [], [], DEADLINE_S)[0], seen
        seen += os.read(terminal, 65536)


root_of = pytest.fixture(scope="session")(debian_roots)


def lived(manager: str, root: Path, packages: Path) -> None:
    words = (sys.executable, "-m", "tests.packages.life", manager, str(root), str(packages))
    told = run("unshare", *NAMESPACES, *words)

    print(told)
    assert told.endswith("LIVED\n")


needs_a_root = needs.root_with("debootstrap")


@needs_a_root
@pytest.mark.parametrize("suite", SUITES)
def test_a_whole_life_on(suite: str, root_of: Callable[..., Path], packages: Path) -> None:
    """Installed, started by the init script, reloaded, upgraded under load, removed, purged."""
    root = root_of(suite)
    assert f"Python {SUITES[suite]}." in run("chroot", root, "python3", "--version")

    lived("deb", root, packages)


@needs_a_root
def test_the_commands_from_a_clean_debian_to_a_broken_release(
    root_of: Callable[..., Path], built: Path
) -> None:
    """Those of docs/install.md; apt-get takes what they need from where this machine does."""
    root = root_of("bookworm", clean=True)
    words = (sys.executable, "-m", "tests.packages.start", "clean", root, built)
    told = run("unshare", *(each for each in NAMESPACES if each != "--net"), *words)

    print(told)
    assert told.endswith("LIVED\n")


@needs_a_root
def test_beside_systemd_nothing_is_started_or_restarted(
    root_of: Callable[..., Path], packages: Path
) -> None:
    lived("systemd", root_of("bookworm"), packages)


@needs_a_root
def test_in_a_container_pid_1_goes_on_until_it_is_upgraded(
    root_of: Callable[..., Path], packages: Path
) -> None:
    lived("container", root_of("bookworm"), packages)


@needs_a_root
def test_unattended_upgrades_and_needrestart_restart_nothing(
    root_of: Callable[..., Path], packages: Path
) -> None:
    lived("unattended", root_of("bookworm", "needrestart", "unattended-upgrades"), packages)
