"""--watch: files change, and the daemon is reloaded."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.procfs import running
from tests.running import MARK, Protector, ask, eventually, marked, wait_gone
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.scenarios.starting import MINIMAL, Start

Starter = Callable[..., Protector]
RELOADED = r"event=(reloaded|reload-failed)\b"

DAEMON = """
import sys
sys.path.insert(0, {workers!r})
from plain import say, take
VERSION = {version!r}
{more}
say(b"READY=1")
while taken := take():
    with taken[1] as client:
        client.recv(100)
        client.sendall(VERSION.encode() + b"\\n")
"""


def put(path: Path, text: str) -> None:
    """Put a file there whole, as one change: a slow reader would see an empty one in between."""
    new = path.parent.with_name(f"{path.parent.name}.{path.name}")  # outside what is watched
    new.write_text(text)
    new.rename(path)


class Source:
    """A daemon that is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.path = folder / "daemon.py"
        self.save("one")

    def save(self, version: str, more: str = "") -> None:
        workers = str(Path(__file__).parents[1] / "workers")
        put(self.path, DAEMON.format(workers=workers, version=version, more=more))

    @property
    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-S", "-E", str(self.path))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "source")


@pytest.fixture
def watching(protector: Starter, source: Source) -> Callable[..., Protector]:
    """Start a protector that watches, and wait until it does."""

    def start(*options: str | Path, **environment: str) -> Protector:
        watch = () if "--watch" in options else ("--watch", source.folder)
        arguments = (*options, *watch, "127.0.0.1:0", "--", *source.command)
        daemon = protector(*arguments, **environment).ready()
        daemon.log.wait_for("event=watching")
        return daemon

    return start


def says(daemon: Protector) -> str:
    return ask(("127.0.0.1", daemon.port))


def after(daemon: Protector, change: Callable[[], object]) -> str:
    """Change something; return how the reload went."""
    mark = len(daemon.log.seen)
    change()
    return daemon.log.wait_for(RELOADED, after=mark)


def watcher_of(environment: str) -> list[int]:
    return running("file_watch.py", marked(environment))


@pytest.mark.costly
def test_a_change_is_a_reload(watching: Starter, source: Source) -> None:
    daemon = watching()
    assert says(daemon) == "one"

    assert "event=reloaded generation=2" in after(daemon, lambda: source.save("two"))

    assert says(daemon) == "two"
    assert daemon.log.count(f"event=files-changed path={source.path} ") == 1
    daemon.stop()


def test_a_burst_of_changes_is_one_reload_or_two(watching: Starter, source: Source) -> None:
    daemon = watching()

    def burst() -> None:
        for number in range(10):
            (source.folder / f"module{number}.py").write_text("pass\n")
            source.save(f"number {number}")

    after(daemon, burst)
    eventually(lambda: says(daemon) == "number 9", "the last one")

    assert daemon.log.count("event=reloaded") <= 2
    daemon.stop()


def test_a_broken_release_shows_its_traceback_and_the_next_fix_is_taken(
    watching: Starter, source: Source
) -> None:
    daemon = watching()

    failed = after(daemon, lambda: source.save("two", "raise LookupError('out of luck')"))
    assert "event=reload-failed generation=2" in failed
    daemon.log.wait_for("^Traceback")
    daemon.log.wait_for("^LookupError: out of luck")
    assert says(daemon) == "one"

    assert "event=reloaded generation=3" in after(daemon, lambda: source.save("three"))
    assert says(daemon) == "three"
    daemon.stop()


def test_files_that_are_not_sources_are_ignored_and_so_are_its_own(
    watching: Starter, source: Source
) -> None:
    folder = source.folder
    daemon = watching("--pid-file", folder / "pid")
    for name in (".git/index", "__pycache__/x.pyc", "node_modules/x.js", ".daemon.py.swp"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "pid").touch()
    # Reported after all of these, which would have come with it at the latest.
    after(daemon, lambda: source.save("two"))

    changed = daemon.log.wait_for("event=files-changed")
    assert f"path={source.path} files=1" in changed
    assert daemon.log.count("event=files-changed") == 1
    daemon.stop()


@pytest.mark.costly
def test_a_log_in_the_watched_folder_leads_to_no_reload(start: Start) -> None:
    start.up("--watch", start.folder, "unix:s", "--", *MINIMAL)
    start.wait_for("event=watching")
    put(start.folder / "source.py", "pass\n")
    start.wait_for("event=reloaded generation=2")
    for _ in range(5):
        start.send(signal.SIGUSR1)
    put(start.folder / "source.py", "pass # again\n")
    start.wait_for("event=reloaded generation=3")
    start.stop()

    assert start.log.count("event=files-changed") == 2
    assert [each for each in start.left() if "source.py" not in each] == []


@pytest.mark.costly
def test_a_file_may_be_replaced_and_a_link_turned(
    watching: Starter, source: Source, tmp_path: Path
) -> None:
    current = tmp_path / "current"
    (tmp_path / "releases" / "a").mkdir(parents=True)
    (tmp_path / "releases" / "b").mkdir()
    current.symlink_to("releases/a")
    daemon = watching("--watch", source.path, "--watch", current)

    def replace() -> None:
        other = Source(tmp_path / "other")
        other.save("two")
        other.path.rename(source.path)

    after(daemon, replace)
    assert says(daemon) == "two"
    (source.folder / "beside.py").write_text("not watched\n")

    def turn() -> None:
        (tmp_path / "new").symlink_to("releases/b")
        (tmp_path / "new").rename(current)

    after(daemon, turn)
    after(daemon, lambda: put(tmp_path / "releases" / "b" / "more.py", "of the new one\n"))
    after(daemon, lambda: source.save("three"))
    assert says(daemon) == "three"
    told = [line for line in daemon.log.seen if "event=files-changed" in line]
    assert ["beside" in line for line in told] == [False] * 4
    daemon.stop()


@pytest.mark.costly
def test_another_folder_may_take_the_place_of_the_one_that_is_watched(
    watching: Starter, source: Source, tmp_path: Path, marked_environment: dict[str, str]
) -> None:
    daemon = watching()
    other = Source(tmp_path / "other")
    other.save("two")

    source.folder.rename(tmp_path / "old")
    other.folder.rename(source.folder)

    daemon.log.wait_for(f"event=files-changed path={source.folder} ")
    eventually(lambda: says(daemon) == "two", "what is in the other folder")
    after(daemon, lambda: source.save("three"))
    # The watcher may report the new folder once more, so the first reload may precede the save.
    eventually(lambda: says(daemon) == "three", "what was saved in it")
    assert len(watcher_of(marked_environment[MARK])) == 1
    daemon.stop()


@pytest.mark.costly
def test_a_watcher_that_dies_is_started_again(
    watching: Starter, source: Source, marked_environment: dict[str, str]
) -> None:
    daemon = watching()
    mark = len(daemon.log.seen)
    (first,) = watcher_of(marked_environment[MARK])
    os.kill(first, signal.SIGKILL)

    daemon.log.wait_for('event=watch-ended reason="was killed by SIGKILL"', after=mark)
    daemon.log.wait_for("event=watching", after=mark)
    assert "event=reloaded" in after(daemon, lambda: source.save("two"))
    assert len(watcher_of(marked_environment[MARK])) == 1
    daemon.stop()


@pytest.mark.costly
def test_it_stays_through_an_upgrade(
    watching: Starter, source: Source, marked_environment: dict[str, str]
) -> None:
    daemon = watching()
    before = watcher_of(marked_environment[MARK])

    assert "event=resumed" in upgrade(daemon)

    assert "event=reloaded" in after(daemon, lambda: source.save("two"))
    assert watcher_of(marked_environment[MARK]) == before
    daemon.stop()
    assert wait_gone(before) == []


@pytest.mark.costly
def test_it_stays_when_the_protector_dies_under_a_guard(
    watching: Starter, source: Source, marked_environment: dict[str, str]
) -> None:
    daemon = watching("--guard")
    before = watcher_of(marked_environment[MARK])

    revived(daemon, kill_protector(daemon))

    assert "event=reloaded" in after(daemon, lambda: source.save("two"))
    assert watcher_of(marked_environment[MARK]) == before
    os.kill(before[0], signal.SIGKILL)
    daemon.log.wait_for("event=watch-ended")
    daemon.stop()


def test_it_ends_with_a_protector_that_is_killed(
    watching: Starter, marked_environment: dict[str, str]
) -> None:
    daemon = watching()
    watchers = watcher_of(marked_environment[MARK])
    daemon.process.kill()

    assert wait_gone(watchers) == []
