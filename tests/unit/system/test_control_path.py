"""Where control sockets are made, and where they are looked for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from socketprotector.system import control_path
from socketprotector.system.control_path import SYSTEM, folders

NOBODY = 65534
ROOT, ALICE = 0, 1000


@pytest.mark.parametrize("session", ["/run/user/0", "/run/user/1000", "/var/run//user/0/"])
def test_root_makes_none_where_a_logout_removes_it_but_looks_there_too(session: str) -> None:
    first, second = folders({"XDG_RUNTIME_DIR": session}, ROOT)

    assert first == SYSTEM
    assert second.startswith(session)


def test_a_user_makes_them_in_the_folder_of_the_session() -> None:
    found = folders({"XDG_RUNTIME_DIR": "/run/user/1000"}, ALICE)

    assert found == ["/run/user/1000/socketprotector", SYSTEM]


@pytest.mark.parametrize("user", [ROOT, ALICE])
def test_another_place_that_is_said_is_meant(user: int) -> None:
    found = folders({"XDG_RUNTIME_DIR": "/srv/run"}, user)

    assert found == ["/srv/run/socketprotector", SYSTEM]


@pytest.mark.parametrize("environment", [{}, {"XDG_RUNTIME_DIR": ""}, {"XDG_RUNTIME_DIR": "run"}])
def test_without_a_whole_path_there_is_one_folder(environment: dict[str, str]) -> None:
    assert folders(environment, ROOT) == folders(environment, ALICE) == [SYSTEM]


@pytest.fixture
def dynamic() -> Iterator[Path]:
    """A runtime folder as systemd makes it for DynamicUser=, seen by a user who is not root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        runtime = Path(made)
        (runtime / "private" / "dynamic").mkdir(parents=True)
        (runtime / "socketprotector").mkdir()
        (runtime / "socketprotector" / "dynamic").symlink_to("../private/dynamic")
        runtime.chmod(0o755)
        (runtime / "private").chmod(0)
        user = os.geteuid()
        if user == ROOT:
            os.seteuid(NOBODY)
        try:
            yield runtime
        finally:
            os.seteuid(user)
            (runtime / "private").chmod(0o700)


def test_a_folder_that_only_root_may_look_into_is_not_left_out(
    dynamic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_path, "SYSTEM", "/nonexistent")

    found = control_path.sockets({"XDG_RUNTIME_DIR": str(dynamic)}, NOBODY)

    assert found == [str(dynamic / "socketprotector" / "dynamic" / "control")]
