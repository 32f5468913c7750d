"""The image: built on a Debian by buildah, and run as PID 1 of a namespace by unshare(1).

    make packages [DEBIAN_ROOTS=FOLDER]     (root; some minutes)

Not collected by itself: the name is no test's.  No registry is asked: the base is a system that
debootstrap has made, and what pip installs is in the context.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import needs
from tests.packages.debian_roots import debian_roots
from tests.packages.dists import VERSION, build
from tests.procfs import children_of
from tests.running import DEADLINE_S, ROOT, Protector, ask, eventually

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
PROGRAMS = "/opt/socketprotector/bin"

pytestmark = [
    needs.ROOT,
    needs.programs("buildah", "debootstrap"),
    pytest.mark.timeout(1800),
]

root_of = pytest.fixture(scope="session")(debian_roots)


def run(*words: str | Path, **environment: str) -> str:
    """Run a command that succeeds; return what it says."""
    done = subprocess.run(
        words,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Image:
    """An image that was built, and a container of it that is mounted."""

    def __init__(self, base: Path, folder: Path) -> None:
        self._store = (
            *("--storage-driver", "vfs", "--root", str(folder / "root")),
            *("--runroot", str(folder / "run")),
        )
        scratch = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", scratch, str(base), "/")
        self.buildah("commit", "--quiet", "--rm", scratch, "localhost/base")
        self.context = folder / "context"
        self.context.mkdir()

    def buildah(self, *words: str) -> str:
        return run("buildah", *self._store, *words).strip()

    def build(self) -> None:
        self.buildah(
            *("build", "--isolation", "chroot", "--format", "docker", "--layers=false"),
            *("--build-context", "base=docker-image://localhost/base"),
            *("--build-arg", "PIP_NO_INDEX=1"),
            *("--file", str(ROOT / "packaging" / "Containerfile"), "--tag", "localhost/image"),
            str(self.context),
        )
        described = json.loads(self.buildah("inspect", "--type", "image", "localhost/image"))
        self.config: dict[str, Any] = described["Docker"]["config"]
        self.root = Path(self.buildah("mount", self.buildah("from", "localhost/image")))

    @property
    def environment(self) -> dict[str, str]:
        """That of a container, and no more."""
        return dict(each.split("=", 1) for each in self.config["Env"])

    def through(self) -> tuple[str, ...]:
        """What executes a program as PID 1 of a container, as the user that the image says."""
        user, _, group = self.config["User"].partition(":")
        return (
            *("/usr/bin/unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL"),
            *(f"--root={self.root}", "--mount-proc", f"--setgid={group}", f"--setuid={user}"),
        )

    def end(self) -> None:
        self.buildah("umount", "--all")
        self.buildah("rm", "--all")
        self.buildah("rmi", "--all", "--force")


@pytest.fixture(scope="session")
def image(
    root_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("image")
    made = Image(root_of("bookworm"), folder)
    try:
        dist = made.context / "dist"
        build(ROOT, dist)
        pinned = str(ROOT / "requirements" / "release.txt")
        into = ("--no-deps", "--dest", str(dist), "--only-binary", ":all:")
        # Debian 12's Python is of this version, which is what pip chooses wheels for.
        words = ("--python-version", "3.11", *into)
        run(*PIP, "download", *words, "--require-hashes", "-r", pinned)
        exporter = str(ROOT / "requirements" / "exporter.txt")
        run(*PIP, "download", *words, "--require-hashes", "-r", exporter)
        shutil.copytree(ROOT / "requirements", made.context / "requirements")
        made.build()
        yield made
    finally:
        made.end()


def test_it_says_what_it_is_for(image: Image) -> None:
    config = image.config

    assert config["User"] == "65534:65534"
    assert config["Entrypoint"] == ["SocketProtector", "-f"]
    assert config["Healthcheck"]["Test"] == ["CMD", "socketprotectorctl", "ready"]
    assert config["StopSignal"] == "SIGTERM"
    assert not (image.root / "wheels").exists()


@pytest.fixture
def container(
    image: Image, marked_environment: dict[str, str]
) -> Iterator[Callable[..., Protector]]:
    """Start the image's entry point with arguments, as PID 1."""
    started: list[Protector] = []

    def start(*arguments: str) -> Protector:
        program, *options = image.config["Entrypoint"]
        started.append(
            Protector(
                [*options[1:], *arguments],
                marked_environment,
                through=image.through(),
                command=(f"{PROGRAMS}/{program}",),
                env={**image.environment, **marked_environment},
            )
        )
        return started[-1]

    yield start
    for each in started:
        # Its user is another one by now, so the end of unshare does not reach it.
        if each.process.poll() is None:
            for pid in children_of(each.pid):
                os.kill(pid, signal.SIGKILL)
        each.end()
        print(f"--- log ---\n{each.log.text()}")


def inside(daemon: Protector) -> int:
    """The pid here of what is 1 there."""
    eventually(lambda: len(children_of(daemon.pid)) == 1, "PID 1")
    [pid] = children_of(daemon.pid)
    return pid


def executed(image: Image, pid: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the container, as `docker exec` does."""
    enter = ("/usr/bin/nsenter", f"--target={pid}", "--mount", "--pid", f"--root={image.root}")
    user = ("--setuid=65534", "--setgid=65534")
    return subprocess.run(
        [*enter, *user, f"{PROGRAMS}/{words[0]}", *words[1:]],
        env=image.environment,
        capture_output=True,
        timeout=DEADLINE_S,
        text=True,
        check=False,
    )


SAMPLE = ("127.0.0.1:0", "--", "SampleClient", "0")


def test_as_pid_1_it_serves_reloads_and_ends_with_status_0(
    image: Image, container: Callable[..., Protector]
) -> None:
    daemon = container("--name", "sample", *SAMPLE).ready()
    assert "pid=1 " in daemon.log.wait_for(r"event=start\b")
    address, pid = ("127.0.0.1", daemon.port), inside(daemon)
    assert Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0] == "65534"
    assert re.fullmatch(r"\[\d+\] hello", ask(address))

    mark = len(daemon.log.seen)
    os.kill(pid, signal.SIGHUP)
    daemon.log.wait_for(r"event=reloaded\b", after=mark)
    assert ask(address)
    reloaded = executed(image, pid, "socketprotectorctl", "reload")
    assert (reloaded.returncode, "generation 3 is serving" in reloaded.stdout) == (0, True)
    assert VERSION in executed(image, pid, "socketprotector", "--version").stdout

    os.kill(pid, signal.SIGTERM)
    assert daemon.process.wait(DEADLINE_S) == 0


def test_its_health_check_says_what_is_so(
    image: Image, container: Callable[..., Protector]
) -> None:
    daemon = container(*SAMPLE).ready()
    pid, check = inside(daemon), image.config["Healthcheck"]["Test"][1:]

    assert executed(image, pid, *check).returncode == 0
    assert executed(image, pid, "socketprotectorctl", "lame-duck", "on").returncode == 0
    said = executed(image, pid, *check)
    assert (said.returncode, said.stderr) == (3, "socketprotectorctl: not ready: lame duck\n")


def test_as_pid_1_it_reaps_whatever_is_left_to_it(
    image: Image, container: Callable[..., Protector]
) -> None:
    daemon = container(*SAMPLE).ready()
    pid = inside(daemon)
    orphan = "import os, signal; os.fork() or os.fork() or os._exit(0); os._exit(7)"

    before = set(children_of(pid))
    assert executed(image, pid, "python", "-c", orphan).returncode == 7
    eventually(lambda: set(children_of(pid)) == before, "only what it has started")


def test_a_release_that_does_not_start_is_status_3(container: Callable[..., Protector]) -> None:
    daemon = container("127.0.0.1:0", "--start-tries", "1", "--", "python", "-c", "1/0")

    assert daemon.process.wait(DEADLINE_S) == 3


def test_it_refuses_wrong_options_with_status_2(container: Callable[..., Protector]) -> None:
    assert container("--no-such-option").process.wait(DEADLINE_S) == 2
