"""The folder of releases and the link `current`: what is accepted, and kills at every write."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from socketprotector.model import release
from socketprotector.model.release import Entry, ReleaseHistory
from socketprotector.programs import release_writer
from socketprotector.system import release_store
from socketprotector.system.release_store import ReleaseError
from tests import needs
from tests.rounds import rounds

OLD = release.added(ReleaseHistory(), Entry("1", 1.0))
NEW = release.added(OLD, Entry("2", 2.0))
NEWER = release.added(NEW, Entry("3", 3.0))
#: Every call by which the store and the writer change something, or wait for the disk.
CALLS = ("symlink", "unlink", "rename", "open", "write", "fsync", "close", "listdir")
#: Of the calls of two writers together, one in so many pairs is tried.
EVERY = rounds(6, 1)


class Place:
    """A folder of releases, and `current` beside it."""

    def __init__(self, folder: Path) -> None:
        self.releases = folder / "releases"
        self.live = folder / "live"
        self.live.mkdir(parents=True)
        for name in ("1", "2"):
            (self.releases / name).mkdir(parents=True)
        self.current = str(self.live / "current")
        os.symlink("../releases/1", self.current)
        (self.live / "current.history").write_bytes(release.dump(OLD))

    def named(self) -> str:
        return release_store.named(self.current, str(self.releases))

    def check(self, name: str, *owners: int) -> str:
        return release_store.check(str(self.releases), name, owners or (os.geteuid(),))

    def deploy(self) -> None:
        """Do all that a deploy of release 2 writes."""
        release_store.prepare(self.current, str(self.releases / "2"))
        release_store.move(self.current, str(self.releases), "2")
        self.write()

    def write(self, history: ReleaseHistory = NEW) -> None:
        """Do what an owner of `current` and its writer do."""
        self.finish(history, *release_store.new_history(self.current))

    def finish(self, history: ReleaseHistory, file: int, following: str) -> None:
        """Do what the writer does."""
        folder, content = os.open(self.live, os.O_RDONLY), os.memfd_create("history")
        os.pwrite(content, release.dump(history), 0)
        try:
            release_writer.main(folder, content, file, following, "current.history")
        finally:
            for each in (folder, content, file):
                os.close(each)

    def history(self) -> ReleaseHistory:
        found = release_store.history(self.current)
        assert found is not None
        return release.load(found)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "srv")


# -- current ------------------------------------------------------------------------


def test_it_names_a_release_by_a_relative_or_absolute_link(place: Place) -> None:
    assert place.named() == "1"
    os.unlink(place.current)
    os.symlink(f"{place.releases}/2/", place.current)
    assert place.named() == "2"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("../releases", "no direct child"),
        ("../releases/1/..", "no direct child"),
        ("../releases/1/x", "No such file|no direct child"),
        ("/etc", "no direct child"),
        ("../live/x", "no direct child"),
        ("../nothing/1", "/nothing/1, but .*/nothing: No such file or dir.*; change it: ln -sfn"),
        ("current", "no direct child"),
        (None, "No such file or directory; make it once: ln -s"),
        ("", "it is no symbolic link; make it once"),
    ],
)
def test_it_is_refused_if_it_leads_elsewhere(place: Place, target: str | None, why: str) -> None:
    os.unlink(place.current)
    if target:
        os.symlink(target, place.current)
    elif target is not None:
        Path(place.current).mkdir()

    with pytest.raises(ReleaseError, match=why):
        place.named()
    assert release_store.leads_to(place.current, str(place.releases)) == ""


def test_it_is_moved_once_and_leaves_nothing_behind(place: Place) -> None:
    place.deploy()

    assert (place.named(), os.readlink(place.current)) == ("2", str(place.releases / "2"))
    inode = os.lstat(place.current).st_ino
    place.deploy()  # a repetition, as after a kill
    assert os.lstat(place.current).st_ino == inode
    assert sorted(os.listdir(place.live)) == ["current", "current.history"]


def test_a_link_that_an_operator_made_stays_if_it_names_the_release(place: Place) -> None:
    release_store.move(place.current, str(place.releases), "1")
    assert os.readlink(place.current) == "../releases/1"


def test_a_failed_release_leaves_no_link(place: Place) -> None:
    release_store.prepare(place.current, str(place.releases / "2"))
    release_store.discard(place.current)
    release_store.discard(place.current)
    assert sorted(os.listdir(place.live)) == ["current", "current.history"]


def test_what_is_in_the_way_of_the_link_is_replaced_or_refused(place: Place) -> None:
    following = Path(f"{place.current}.next")
    following.symlink_to("/etc")
    release_store.prepare(place.current, "x")
    assert os.readlink(following) == "x"
    following.unlink()
    following.write_text("a file")
    with pytest.raises(OSError, match=r"/current\.next is no symbolic link, and is not replaced"):
        release_store.prepare(place.current, "x")
    release_store.discard(place.current)
    assert following.read_text() == "a file"


@pytest.mark.parametrize("kind", ["file", "folder", "fifo"])
def test_only_a_symbolic_link_is_replaced(place: Place, kind: str) -> None:
    os.unlink(place.current)
    if kind == "folder":
        os.mkdir(place.current)
    else:
        os.mknod(place.current, stat.S_IFIFO if kind == "fifo" else stat.S_IFREG)
    was = os.lstat(place.current)

    said = "/current is no symbolic link, and is not replaced"
    with pytest.raises(OSError, match=said):
        release_store.prepare(place.current, str(place.releases / "2"))
    with pytest.raises(OSError, match=said):
        release_store.move(place.current, str(place.releases), "2")

    assert os.lstat(place.current) == was
    assert sorted(os.listdir(place.live)) == ["current", "current.history"]


@pytest.mark.parametrize("target", ["../releases/gone", "/etc", "current", "."])
def test_a_link_that_leads_nowhere_is_replaced(place: Place, target: str) -> None:
    os.unlink(place.current)
    os.symlink(target, place.current)
    assert release_store.in_the_way(place.current) == ""

    release_store.move(place.current, str(place.releases), "2")

    assert place.named() == "2"


# -- an unreadable history ------------------------------------------------------------


def test_an_unreadable_history_is_kept_beside_those_before(place: Place) -> None:
    history = Path(f"{place.current}.history")
    for name, text in (("unreadable", "a"), ("unreadable.2", "b"), ("unreadable.3", "c")):
        history.write_text(text)
        release_store.keep_unreadable(place.current)
        assert not history.exists()
        assert Path(f"{history}.{name}").read_text() == text
    release_store.keep_unreadable(place.current)  # there is none
    assert Path(f"{history}.unreadable").read_text() == "a"


# -- a release -------------------------------------------------------------------------


def test_a_release_of_ours(place: Place) -> None:
    assert place.check("1") == str(place.releases / "1")


@pytest.mark.parametrize("name", ["..", ".", "", "1/..", "../live", "/etc", "a\nb", "-x"])
def test_no_name_leads_out(place: Place, name: str) -> None:
    with pytest.raises(ReleaseError, match="write a name of"):
        place.check(name)


def test_a_link_or_a_file_is_no_release(place: Place) -> None:
    (place.releases / "out").symlink_to("/etc")
    (place.releases / "inside").symlink_to("1")
    (place.releases / "file").touch()
    for name in ("out", "inside", "file"):
        with pytest.raises(ReleaseError, match="it is no folder; a link is not followed"):
            place.check(name)
    with pytest.raises(ReleaseError, match=r"release .*/nosuch: No such file or directory"):
        place.check("nosuch")


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
@pytest.mark.parametrize("which", ["release", "folder"])
def test_a_folder_that_others_can_write_is_refused(place: Place, mode: int, which: str) -> None:
    path = place.releases / "1" if which == "release" else place.releases
    path.chmod(mode)
    with pytest.raises(ReleaseError, match=rf"{path} \(.*\): other users can write it; chmod"):
        place.check("1")


@needs.ROOT
@pytest.mark.parametrize("which", ["release", "folder"])
def test_another_users_folder_is_refused(place: Place, which: str) -> None:
    path = place.releases / "1" if which == "release" else place.releases
    os.chown(path, 65534, -1)
    with pytest.raises(ReleaseError, match=rf"{path} belongs to uid 65534, not to 0; change"):
        place.check("1", 0)
    assert place.check("1", 0, 65534)


# -- the lock ----------------------------------------------------------------------------


def test_it_has_one_owner_at_a_time(place: Place) -> None:
    first = release_store.lock(place.current)
    assert first is not None
    assert release_store.lock(place.current) is None
    os.close(first)
    second = release_store.lock(place.current)
    assert second is not None
    os.close(second)


def test_other_users_cannot_open_the_lock_and_take_it_first(place: Place) -> None:
    fd = release_store.lock(place.current)
    assert fd is not None
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    os.close(fd)


def test_no_link_is_followed_to_lock_or_read_anything(place: Place, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    os.symlink(victim, f"{place.current}.lock")
    with pytest.raises(OSError, match="symbolic links"):
        release_store.lock(place.current)
    assert not victim.exists()
    os.unlink(f"{place.current}.history")
    os.mkfifo(f"{place.current}.history")
    with pytest.raises(ReleaseError, match="it is no regular file"):
        release_store.history(place.current)


# -- what was proved, and may have changed ------------------------------------------------


def test_the_fingerprint_sees_the_folder_and_the_program_and_no_more(place: Place) -> None:
    folder = place.releases / "1"
    program = folder / "daemon"
    program.write_text("1")
    was = release_store.fingerprint(str(folder), str(program))
    (folder / "__pycache__").mkdir()

    assert was is not None
    assert release_store.fingerprint(str(folder), str(program)) == was
    program.write_text("22")
    assert release_store.fingerprint(str(folder), str(program)) != was
    program.unlink()
    assert release_store.fingerprint(str(folder), str(program)) is None


# -- kills and failures at every call ------------------------------------------------------


def each_call(
    monkeypatch: pytest.MonkeyPatch, at: int, then: Callable[[], None], after: bool
) -> list[str]:
    """Let a thing happen before, or after, the n-th of CALLS; return the calls so far."""
    seen: list[str] = []

    def wrapped(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **more: object) -> object:
            seen.append(name)
            if len(seen) == at and not after:
                then()
            try:
                return real(*args, **more)
            finally:
                if len(seen) == at and after:
                    then()

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrapped(name))
    return seen


def calls_of_a_deploy(folder: Path, stale: bool) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        place = Place(folder)
        if stale:
            os.symlink("/stale", f"{place.current}.next")
        seen = each_call(patch, 0, lambda: None, after=False)
        place.deploy()
        return list(seen)


def in_a_child(place: Place, at: int, then: Callable[[], None], after: bool) -> int:
    """Deploy in a process of its own; return its end: an errno, or a signal's number below 0."""
    child = os.fork()
    if child == 0:
        status = 0
        try:
            with pytest.MonkeyPatch.context() as patch:
                each_call(patch, at, then, after)
                place.deploy()
        except OSError as error:
            status = error.errno or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("after", "stale"),
    [  # After a call is before the next one.
        pytest.param(False, False, id="before-clean"),
        pytest.param(False, True, id="before-stale", marks=pytest.mark.costly),
        pytest.param(True, False, id="after-clean", marks=pytest.mark.costly),
        pytest.param(True, True, id="after-stale"),
    ],
)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_release_and_history(
    tmp_path: Path, stale: bool, after: bool
) -> None:
    calls = calls_of_a_deploy(tmp_path / "all", stale)
    assert {"symlink", "rename", "write", "fsync"} <= set(calls)
    for at in range(1, len(calls) + 1):
        place = Place(tmp_path / str(at))
        if stale:
            os.symlink("/stale", f"{place.current}.next")
        ended = in_a_child(place, at, lambda: os.kill(os.getpid(), signal.SIGKILL), after)
        assert ended == -signal.SIGKILL, calls[at - 1]
        assert place.named() in ("1", "2")
        assert place.history() in (OLD, NEW)
        place.deploy()  # the next program does the same again
        assert (place.named(), place.history()) == ("2", NEW)
        left = set(os.listdir(place.live)) - {"current", "current.history"}
        assert left == set(), calls[at - 1]


def calls_of_a_writer(folder: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        place = Place(folder)
        begun = release_store.new_history(place.current)
        seen = each_call(patch, 0, lambda: None, after=False)
        place.finish(NEW, *begun)
        return list(seen)


def suspended(place: Place, history: ReleaseHistory, at: int) -> int:
    """Start a writer that suspends itself before its n-th call; return its pid."""
    begun = release_store.new_history(place.current)
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            each_call(patch, at, lambda: os.kill(os.getpid(), signal.SIGSTOP), after=False)
            with suppress(OSError):  # its file is gone
                place.finish(history, *begun)
        os._exit(0)
    os.close(begun[0])
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    return child


def resume(child: int) -> None:
    os.kill(child, signal.SIGCONT)
    os.waitpid(child, 0)


def test_a_writer_of_an_earlier_owner_changes_nothing_after_the_next_owner_has_read(
    tmp_path: Path,
) -> None:
    calls = calls_of_a_writer(tmp_path / "all")
    assert {"write", "fsync", "rename"} <= set(calls)
    for at, call in enumerate(calls, 1):
        place = Place(tmp_path / str(at))
        older = suspended(place, NEW, at)

        release_store.withdraw_writers(place.current)
        read = place.history()
        resume(older)

        assert place.history() == read == (NEW if at > calls.index("rename") + 1 else OLD), call
        assert sorted(os.listdir(place.live)) == ["current", "current.history"], call


def test_a_writer_of_an_earlier_owner_never_replaces_a_newer_history(tmp_path: Path) -> None:
    """Each writer is suspended at each of its calls, and the earlier one goes on first."""
    calls = calls_of_a_writer(tmp_path / "all")
    for at in range(1, len(calls) + 1):
        # A sixth of the newer one's calls: another sixth for the earlier one's next call.
        for newer_at in range(1 + at % EVERY, len(calls) + 1, EVERY):
            call = calls[newer_at - 1]
            place = Place(tmp_path / f"{at}-{newer_at}")
            older = suspended(place, NEW, at)
            newer = suspended(place, NEWER, newer_at)
            before = place.history()

            resume(older)

            assert place.history() == before, (calls[at - 1], call)
            resume(newer)
            assert place.history() == NEWER, (calls[at - 1], call)
            assert sorted(os.listdir(place.live)) == ["current", "current.history"]


def test_only_the_owner_can_read_the_history(place: Place) -> None:
    before = os.umask(0)
    try:
        place.write()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(f"{place.current}.history").st_mode) == 0o600


def test_a_writer_removes_no_copy_of_an_operator(tmp_path: Path) -> None:
    place = Place(tmp_path)
    copies = {"current.history.20261125", "current.history.1", "current.history.bak"}
    for each in copies:
        (place.live / each).write_text("mine")
    (place.live / "current.history.next.1").mkdir()
    (place.live / "current.history.next.2").touch()

    place.write(NEW)

    assert place.history() == NEW
    left = set(os.listdir(place.live)) - {"current", "current.history"}
    assert left == {*copies, "current.history.next.1"}


@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSPC,
        *(
            pytest.param(each, marks=pytest.mark.costly)
            for each in (errno.EDQUOT, errno.EIO, errno.EROFS)
        ),
    ],
)
def test_an_error_at_any_call_leaves_the_old_or_the_new_release_and_history(
    tmp_path: Path, number: int
) -> None:
    for at, name in enumerate(calls_of_a_deploy(tmp_path / "all", stale=True), 1):
        place = Place(tmp_path / str(at))
        os.symlink("/stale", f"{place.current}.next")

        def fail() -> None:
            raise OSError(number, os.strerror(number))

        assert in_a_child(place, at, fail, after=False) == number, name
        assert place.named() in ("1", "2"), name
        assert place.history() in (OLD, NEW), name
        if name != "open":  # a writer whose rename failed has removed its file
            assert not [*place.live.glob("current.history.next.*")], name
        place.deploy()
        assert (place.named(), place.history()) == ("2", NEW), name
