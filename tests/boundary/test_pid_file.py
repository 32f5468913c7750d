"""The pid file's lock, whatever fails half-way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from lockfile import NotMyLock

from socketprotector.launch.pid_file import PidFile
from socketprotector.model.errors import AlreadyRunning, SystemRefused, UsageError


def holder(looking: PidFile) -> str | None:
    """The process that is said to hold it."""
    try:
        looking.refuse_if_held("wait")
    except AlreadyRunning as error:
        return (
            str(error).partition("is held by ")[2].removesuffix("; wait").removeprefix("process ")
        )
    return None


def test_it_is_whole_locked_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    ours, theirs = PidFile(str(path)), PidFile(str(path))

    ours.acquire()

    assert path.read_text() == f"{os.getpid()}\n"
    assert holder(theirs) == str(os.getpid())
    with pytest.raises(AlreadyRunning, match=f"held by process {os.getpid()}"):
        theirs.acquire()
    ours.release()
    assert list(tmp_path.iterdir()) == []
    assert holder(theirs) is None


def test_it_is_replaced_when_no_process_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("1\n")
    ours = PidFile(str(path))

    assert holder(ours) is None
    ours.acquire()

    assert path.read_text() == f"{os.getpid()}\n"
    ours.release()


def test_looking_does_not_lock(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("1\n")
    looking, ours = PidFile(str(path)), PidFile(str(path))

    holder(looking)
    ours.acquire()

    assert holder(looking) == str(os.getpid())
    ours.release()


@pytest.mark.parametrize("call", ["open", "fchmod", "write", "rename"])
def test_a_system_call_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real_open = os.open

    def fails(*arguments: object, **_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opens(path: str, flags: int, *more: int, **named: int) -> int:
        return fails() if flags & os.O_CREAT else real_open(path, flags, *more, **named)

    monkeypatch.setattr(os, call, opens if call == "open" else fails)
    ours = PidFile(str(tmp_path / "pid"))

    with pytest.raises(SystemRefused, match="No space left on device"):
        ours.acquire()

    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotMyLock):
        ours.release()


def replaced(path: Path, then: Path) -> None:
    then.rename(path)


def grown(path: Path, then: Path) -> None:
    path.write_bytes(path.read_bytes() + then.read_bytes())


@pytest.mark.parametrize("stale", ["1\n", None], ids=["a stale one", "none"])
@pytest.mark.parametrize("change", [replaced, grown])
def test_a_file_that_changes_before_the_rename_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stale: str | None,
    change: Callable[[Path, Path], None],
) -> None:
    path, other = tmp_path / "pid", tmp_path / "other"
    other.write_text("precious")
    if stale is not None:
        path.write_text(stale)
    elif change is grown:
        path.touch()
    real_write = os.write

    def writes(fd: int, data: bytes) -> int:
        change(path, other)
        return real_write(fd, data)

    monkeypatch.setattr(os, "write", writes)
    with pytest.raises(UsageError, match="pid file"):
        PidFile(str(path)).acquire()

    assert path.read_text().endswith("precious")
    assert {each.name for each in tmp_path.iterdir()} <= {"pid", "other"}


def test_a_link_that_comes_in_its_place_just_now_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "pid", tmp_path / "other"
    path.write_text("1\n")
    other.write_text("2\n")
    real_open = os.open

    def opens(name: str, flags: int, *more: int, **named: int) -> int:
        if name.endswith("/pid") and not path.is_symlink():
            path.unlink()
            path.symlink_to(other)
        return real_open(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", opens)
    with pytest.raises(SystemRefused, match="symbolic links"):
        PidFile(str(path)).acquire()

    assert path.readlink() == other
    assert other.read_text() == "2\n"


def test_a_folder_that_becomes_a_link_to_another_changes_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of a folder around it can do that at any moment; here before the rename."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    for each in (ours, other):
        each.mkdir()
        (each / "pid").write_text("1\n")
    real_write = os.write

    def writes(fd: int, data: bytes) -> int:
        ours.rename(tmp_path / "away")
        ours.symlink_to(other)
        return real_write(fd, data)

    monkeypatch.setattr(os, "write", writes)
    file = PidFile(str(ours / "pid"))
    file.acquire()
    os.close(file.fd)

    assert [each.name for each in other.iterdir()] == ["pid"]
    assert (other / "pid").read_text() == "1\n"
    assert (tmp_path / "away" / "pid").read_text() == f"{os.getpid()}\n"


def test_a_full_disk_is_not_said_to_be_a_matter_of_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", fails)
    with pytest.raises(SystemRefused, match="left on device; free space there") as refused:
        PidFile(str(tmp_path / "pid")).acquire()

    assert "permissions" not in str(refused.value)


def test_a_folder_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(SystemRefused, match="No such file or directory"):
        PidFile(str(tmp_path / "no" / "pid")).acquire()


@pytest.mark.parametrize("content", ["", "garbage", "12 34", "-5", "\0"])
def test_a_held_file_with_other_content_has_a_holder_all_the_same(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "pid"
    ours = PidFile(str(path))
    ours.acquire()
    path.write_text(content)

    assert holder(PidFile(str(path))) == "a process that it does not name"
    ours.release()
