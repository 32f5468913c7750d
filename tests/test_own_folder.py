"""A run's folder is its own, and those of runs that have failed do not stay for ever."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from tests.own_folder import OwnFolder, let_through


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_of_those_that_have_failed_a_few_are_kept_and_each_that_runs(place: Path) -> None:
    runs = OwnFolder()
    os.utime(runs.path, (0, 0))
    for _ in range(6):
        OwnFolder().end(keep=True)

    assert len([*place.iterdir()]) == 5  # the newest had not been made when it tidied up
    assert runs.path.exists()
    runs.end(keep=False)
    assert not runs.path.exists()


def test_any_user_may_go_there_and_read_no_more(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    below = tmp_path / "below"
    below.mkdir(mode=0o750)

    let_through(below)

    assert stat.S_IMODE(below.stat().st_mode) == 0o751
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o711
