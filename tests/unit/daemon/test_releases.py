"""Releases without a process: the history and its writer, the link, and what verdicts mean."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from socketprotector.core import stop
from socketprotector.core.actions import Report, ReportKind
from socketprotector.core.failure import NOT_STORED
from socketprotector.daemon import release_history, releases
from socketprotector.daemon.releases import Releases
from socketprotector.model import release
from socketprotector.model.lazy_dataclass import replace
from socketprotector.model.records import Program
from socketprotector.model.release import FAILED, PROVED, REFUSED, ReleaseHistory
from socketprotector.model.settings import Settings
from socketprotector.system import release_store
from socketprotector.system.helper import HelperProcess
from socketprotector.system.loop import Loop
from tests.unit.daemon.clock import Clock


class World:
    """A folder of releases, and a writer of the history that ends when a test says so."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.folder, self.live = folder / "releases", folder / "live"
        self.live.mkdir()
        for name in ("1", "2", "3"):
            (self.folder / name).mkdir(parents=True)
        self.current = self.live / "current"
        self.current.symlink_to(self.folder / "1")
        self.settings = Settings(
            "web",
            ("sh",),
            "/",
            release="1",
            releases=str(self.folder),
            current=str(self.current),
        )
        self.writes: list[tuple[ReleaseHistory, Callable[[str], None]]] = []
        self.cannot_write = False
        patch.setattr(release_history, "write", self._write)
        self._runtime = self.clock.use_in(patch, releases)
        self._made: list[Releases] = []

    def make(self, lock: int | None = None) -> Releases:
        self._made.append(Releases(lambda: self.settings, self._runtime, lock))
        return self._made[-1]

    def close(self) -> None:
        for each in self._made:
            for fd in each.link.descriptors().values():
                os.close(fd)

    def _write(self, _: str, history: ReleaseHistory, __: Any, done: Callable[[str], None]) -> None:
        if self.cannot_write:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self.writes.append((history, done))

    def writer_ends(self, failure: str = "") -> None:
        history, done = self.writes.pop(0)
        if not failure:
            Path(f"{self.current}.history").write_bytes(release.dump(history))
        done(failure)

    def point_at(self, name: str) -> None:
        """Move `current` as an operator would."""
        self.current.unlink()
        self.current.symlink_to(self.folder / name)

    def proved(
        self, made: Releases, name: str, during: Callable[[], object] = lambda: None
    ) -> Report:
        """Let a deploy of a release succeed, but for the writer.  during: called before its end."""
        assert made.begin(name) == name
        candidate = replace(self.settings, release=name, release_wanted=name)
        assert made.prepare(candidate, dry_run=False) == ""
        during()
        self.settings = replace(self.settings, release=name)
        made.move(name)
        return made.reported(Report(ReportKind.RELOADED, 2), self.program(name))

    def program(self, name: str) -> Program:
        return Program(
            path="/bin/sh",
            argv=("sh",),
            directory="/",
            environment=(),
            umask=0,
            limits=(),
            nice=0,
            release=name,
        )

    def failed(self, made: Releases, name: str, reason: str, *, started: bool = True) -> Report:
        made.begin(name)
        report = Report(ReportKind.RELOAD_FAILED, 2, reason)
        return made.reported(report, self.program(name) if started else None)

    @staticmethod
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    @contextmanager
    def cannot_move(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as faulty:
            faulty.setattr(release_store, "move", self.fail)
            yield


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.close()


def outcomes(made: Releases) -> list[tuple[str, str]]:
    return [(each.release, each.outcome) for each in made.history.value.entries]


# -- the history ------------------------------------------------------------------------


def test_it_is_saved_when_the_last_change_is_on_disk(world: World) -> None:
    made = world.make()
    world.proved(made, "2")
    assert not made.is_saved
    world.proved(made, "3")  # while the first change is being written
    assert len(world.writes) == 1

    world.writer_ends()
    assert not made.is_saved
    world.writer_ends()

    assert (made.is_saved, world.writes) == (True, [])
    assert world.make().history.value == made.history.value


def test_a_failed_write_is_said_once_and_repeated_ever_more_slowly(world: World) -> None:
    made = world.make()
    world.proved(made, "2")
    for wait_s in (1.0, 2.0, 4.0):
        world.writer_ends("current.history: No space left on device")
        assert made.error.endswith("current.history: No space left on device")
        world.clock.pass_time(wait_s - 0.1)
        assert not world.writes
        world.clock.pass_time(0.2)
        assert world.writes

    world.writer_ends()

    assert (made.error, made.is_saved) == ("", True)
    assert world.clock.lines == ["history-not-written", "history-written"]


def test_a_writer_that_cannot_be_started_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HelperProcess, "start_own", World.fail)

    with closing(Loop()) as loop, pytest.raises(OSError, match="Read-only file system"):
        release_history.write(str(tmp_path / "current"), ReleaseHistory(), loop, World.fail)

    assert os.listdir(tmp_path) == []


def test_without_memory_for_a_writer_it_is_repeated(world: World) -> None:
    made = world.make()
    world.cannot_write = True
    world.proved(made, "2")
    assert "Cannot allocate memory" in made.error
    world.cannot_write = False

    world.clock.pass_time(1.1)
    world.writer_ends()

    assert made.is_saved


def test_a_broken_file_is_empty_and_said_and_written_whole_again(world: World) -> None:
    file = world.live / "current.history"
    file.write_bytes(release.dump(ReleaseHistory(way=("1",)))[:-5])

    made = world.make()

    assert (made.history.value, world.clock.lines) == (ReleaseHistory(), ["history-unreadable"])
    world.proved(made, "2")
    world.writer_ends()
    assert release.load(file.read_bytes()).way == ("2",)


def test_a_new_owner_that_cannot_read_the_file_writes_what_it_knows_and_says_so(
    world: World,
) -> None:
    file = world.live / "current.history"
    file.write_bytes(release.dump(ReleaseHistory(way=("1",))))
    lock = release_store.lock(str(world.current))
    assert lock is not None
    made = world.make()
    file.write_text('{"format": 99}')
    os.close(lock)

    assert made.become_owner()

    assert world.clock.lines == ["history-unreadable"]
    assert "the history of releases is kept in memory; " in str(world.clock.fields[-1]["hint"])
    assert not made.is_saved
    world.writer_ends()
    assert (made.is_saved, release.load(file.read_bytes()).way) == (True, ("1",))


def test_an_unreadable_file_stays_until_it_has_another_name(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, kept = world.live / "current.history", world.live / "current.history.unreadable"
    file.write_text('{"format": 99}')
    made = world.make()
    assert file.exists()  # a reader changes nothing
    with monkeypatch.context() as faulty:
        faulty.setattr(release_store, "keep_unreadable", world.fail)
        world.proved(made, "2")
        assert (world.writes, file.read_text()) == ([], '{"format": 99}')
        assert made.error.endswith("Read-only file system")

    world.clock.pass_time(1.1)
    world.writer_ends()

    assert (kept.read_text(), release.load(file.read_bytes()).way) == ('{"format": 99}', ("2",))
    assert made.is_saved
    assert world.clock.lines == ["history-unreadable", "history-not-written", "history-written"]


def test_the_owner_withdraws_the_writers_of_earlier_owners_before_it_reads(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = world.live / "current.history.next.0123456789abcdef"
    late.touch()
    real = release_store.history

    def read(current: str) -> bytes | None:
        assert not late.exists()
        return real(current)

    monkeypatch.setattr(release_store, "history", read)
    assert world.make().link.is_owned


def test_a_protector_that_does_not_own_current_leaves_the_owners_files(world: World) -> None:
    owner = world.make()
    file, theirs = world.live / "current.history", world.live / "current.history.next.1"
    file.write_text("{")
    theirs.touch()

    other = world.make()
    world.proved(other, "2")

    assert (owner.link.is_owned, other.link.is_owned) == (True, False)
    assert (world.writes, file.read_text(), theirs.exists()) == ([], "{", True)


# -- the link ---------------------------------------------------------------------------


def test_a_move_that_fails_is_repeated_and_then_synced(world: World) -> None:
    made = world.make()
    with world.cannot_move():
        report = world.proved(made, "2")
        assert report.reason.endswith(
            "still names 1: Read-only file system; SocketProtector tries again"
        )
        world.writer_ends()
        assert (made.link.due, made.is_saved, made.link.named) == ("2", False, "1")
        world.clock.pass_time(1.1)
    world.clock.pass_time(2.1)

    assert (made.link.due, made.link.named) == ("", "2")
    # The folder is synced after the late rename, too.
    assert not made.is_saved
    world.writer_ends()
    assert (made.is_saved, made.error) == (True, "")
    assert world.clock.lines == ["current-not-moved", "current-moved"]
    assert world.clock.saves == 2


def test_a_sync_during_a_write_is_another_write(world: World) -> None:
    made = world.make()
    world.proved(made, "2")

    made.history.sync()

    world.writer_ends()
    assert not made.is_saved
    world.writer_ends()
    assert made.is_saved


@pytest.mark.parametrize("asked", [lambda made: made.begin(""), Releases.to_start])
def test_a_link_that_an_operator_moved_meanwhile_stays(
    world: World, asked: Callable[[Releases], str]
) -> None:
    made = world.make()
    with world.cannot_move():
        world.proved(made, "2")
    world.current.unlink()
    world.current.symlink_to(world.folder / "3")

    assert asked(made) == ""

    assert (made.link.due, made.link.named) == ("", "3")


def test_each_release_that_current_cannot_name_is_said_once(world: World) -> None:
    made = world.make()
    with world.cannot_move():
        world.proved(made, "2")
        world.clock.pass_time(10)
        world.proved(made, "3")
        world.clock.pass_time(10)
    world.clock.pass_time(60)

    said = [
        (each, fields["release"])
        for each, fields in zip(world.clock.lines, world.clock.fields, strict=True)
        if "current" in each
    ]
    failed, moved = "current-not-moved", "current-moved"
    assert said == [(failed, "2"), (failed, "3"), (moved, "3")]


@pytest.mark.parametrize("by", ["operator", "deploy", "failed deploy"])
def test_each_failure_is_first_repeated_after_a_second(world: World, by: str) -> None:
    made = world.make()
    with world.cannot_move():
        world.proved(made, "2")
        world.clock.pass_time(200)  # retries now come a minute apart
    if by == "operator":
        world.current.unlink()
        world.current.symlink_to(world.folder / "gone")
        made.begin("")
    elif by == "deploy":
        world.proved(made, "1")
    assert made.link.due == ("2" if by == "failed deploy" else "")
    with world.cannot_move():
        world.proved(made, "3")
    assert made.link.due == "3"

    world.clock.pass_time(1.1)

    assert (made.link.due, made.link.named) == ("", "3")


@pytest.mark.parametrize("by_operator", ["", "3"])
def test_a_stop_does_not_leave_a_move_for_later(world: World, by_operator: str) -> None:
    made = world.make()
    with world.cannot_move():
        world.proved(made, "2")
    if by_operator:
        world.point_at(by_operator)

    made.link.move_if_due()

    assert made.link.named == (by_operator or "2")


def test_the_next_program_syncs_what_an_earlier_one_may_not_have(world: World) -> None:
    made = world.make()
    world.proved(made, "2")
    world.writer_ends()

    made.resume("", world.program("2"), "1")

    assert not made.is_saved
    world.writer_ends()
    assert made.is_saved
    assert outcomes(made) == [("2", PROVED)]


def test_the_lock_has_one_owner_and_the_next_owner_reads_the_history(world: World) -> None:
    first, second = world.make(), world.make()
    assert (first.become_owner(), second.become_owner()) == (True, False)
    world.proved(first, "2")
    world.writer_ends()
    second.move("3")
    assert first.link.named == "2"  # the other one moves nothing
    [fd] = first.link.descriptors().values()
    fcntl.flock(fd, fcntl.LOCK_UN)

    late = world.live / "current.history.next.0123456789abcdef"
    late.touch()  # the first one's writer has not renamed it yet

    assert second.become_owner()

    assert second.history.value == first.history.value
    assert not late.exists()


def test_two_protectors_never_own_the_link_although_the_locks_file_was_removed(
    world: World,
) -> None:
    first, lock = world.make(), world.live / "current.lock"
    lock.unlink()
    assert first.become_owner()  # it locks a new file
    second = world.make()
    assert not second.become_owner()

    lock.unlink()

    assert second.become_owner()
    assert not first.become_owner()
    assert (first.link.descriptors(), first.error) == ({}, "")


def test_an_inherited_lock_whose_file_was_removed_makes_no_owner(world: World) -> None:
    """systemd and the guard keep the first lock, although its owner has locked a new file."""
    first, lock = world.make(), world.live / "current.lock"
    [stored] = (os.dup(fd) for fd in first.link.descriptors().values())
    lock.unlink()
    second = world.make()

    resumed = world.make(stored)

    assert [each.link.is_owned for each in (second, resumed)] == [True, False]


def test_a_move_is_not_repeated_once_another_protector_owns_the_link(world: World) -> None:
    first, lock = world.make(), world.live / "current.lock"
    with world.cannot_move():
        world.proved(first, "2")
    lock.unlink()
    assert world.make().become_owner()

    world.clock.pass_time(1.1)

    assert (first.link.due, first.link.named) == ("", "1")


@pytest.mark.parametrize("before", ["1", "3", "gone"])
def test_a_link_that_is_moved_during_a_deploy_is_moved_again_and_that_is_said(
    world: World, before: str
) -> None:
    made = world.make()
    world.point_at(before)

    report = world.proved(made, "2", during=lambda: world.point_at("2-beta"))

    assert report.reason == "current was moved to 2-beta during the reload; it names 2 now"
    assert (world.clock.lines, made.link.named) == (["current-moved-again"], "2")


def test_a_link_that_is_removed_during_a_deploy_is_made_again_and_that_is_said(
    world: World,
) -> None:
    made = world.make()

    report = world.proved(made, "2", during=world.current.unlink)

    said = "current led to no release at the end of the reload; it names 2 now"
    assert report.reason == said
    assert (world.clock.lines, made.link.named) == (["current-moved-again"], "2")


def test_a_link_that_was_moved_long_before_a_deploy_is_moved_in_silence(world: World) -> None:
    """With --force, say, or by a rollback: the operator knows where it led."""
    made = world.make()
    world.point_at("3")

    report = world.proved(made, "2")

    assert (report.reason, world.clock.lines, made.link.named) == ("", [], "2")


def test_a_move_that_a_later_reload_completes_is_no_move_by_an_operator(world: World) -> None:
    made = world.make()
    with world.cannot_move():
        world.proved(made, "2")
    assert made.begin("") == "2"

    report = world.proved(made, "2")

    assert (report.reason, made.link.named) == ("", "2")
    assert "current-moved-again" not in world.clock.lines


def test_the_next_program_knows_where_the_link_led_when_the_deploy_began(world: World) -> None:
    first = world.make()
    world.point_at("3")
    first.begin("2")
    first.link.close()
    second = world.make()

    second.resume("", None, first.named_at_begin)
    second.move("2")

    assert (world.clock.lines, second.link.named) == ([], "2")


# -- verdicts ---------------------------------------------------------------------------


def test_a_release_failed_if_it_was_started_and_was_refused_if_not(world: World) -> None:
    made = world.make()
    world.failed(made, "2", "worker 3 exited with status 7\nwhen the protector was killed")
    world.failed(made, "3", f"{world.folder}/3/daemon: Permission denied", started=False)

    assert outcomes(made) == [("2", FAILED), ("3", REFUSED)]
    assert made.link.named == "1"


@pytest.mark.parametrize(
    ("name", "reason", "started"),
    [
        ("2", stop.CALLED_OFF, True),
        ("2", "it was starting when the protector was killed", True),
        ("2", NOT_STORED, True),
        ("2", "it was starting when the protector was killed; restore 1/daemon", True),
        ("2", "cannot read web.toml", False),  # it names no path of the release
        ("gone", "no such release", True),
        ("1", "the serving release", True),
    ],
)
def test_what_is_no_fault_of_a_release_is_not_in_the_history(
    world: World, name: str, reason: str, started: bool
) -> None:
    made = world.make()
    world.failed(made, name, reason, started=started)
    assert outcomes(made) == []


def test_a_current_that_names_a_failed_release_is_said(world: World) -> None:
    made = world.make()
    world.current.unlink()
    world.current.symlink_to(world.folder / "2")

    assert made.begin("") == ""
    failed = Report(ReportKind.RELOAD_FAILED, 2, "it exited")
    report = made.reported(failed, world.program("2"))

    said = "current names 2, which failed; a restart would start 2"
    assert report.reason == f"it exited; {said}"
    assert made.warning == said


@pytest.mark.parametrize(
    ("reason", "started"), [(stop.CALLED_OFF, True), ("cannot read web.toml", False)]
)
def test_a_current_that_names_a_release_without_a_failure_is_said_as_in_status(
    world: World, reason: str, started: bool
) -> None:
    made = world.make()
    world.point_at("2")

    assert made.begin("") == ""
    failed = Report(ReportKind.RELOAD_FAILED, 2, reason)
    report = made.reported(failed, world.program("2") if started else None)

    said = "current names 2, and 1 is serving; a restart starts 2"
    assert report.reason == f"{reason}; {said}"
    assert made.warning == said


def test_without_a_place_for_the_link_nothing_is_tried(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world.make()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(release_store, "prepare", full)
    candidate = replace(world.settings, release="2", release_wanted="2")
    assert made.prepare(candidate, dry_run=True) == ""
    assert made.prepare(candidate, dry_run=False).endswith("current.next: No space left on device")

    made.move("2")

    assert made.link.due == "2"
    assert made.prepare(candidate, dry_run=False) == "", "that release is serving: see begin()"


def test_a_writer_that_is_killed_is_said_to_have_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, failures = list[Callable[[str], None]](), list[str]()
    monkeypatch.setattr(HelperProcess, "start_own", lambda *given: ends.append(given[-1]))
    with closing(Loop()) as loop:
        release_history.write(str(tmp_path / "current"), ReleaseHistory(), loop, failures.append)
        [end] = ends
        end("was killed by SIGKILL")

    assert failures == ["it said nothing (was killed by SIGKILL)"]
