"""A service's user against root's socketprotectorctl: its own paths lead to another service."""

from __future__ import annotations

import json
import os
import pwd
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.running import Ended
from tests.scenarios.starting import Start
from tests.scenarios.users import A, B, Command
from tests.unit.ctl.conftest import run

pytestmark = [needs.ANOTHER_USER, pytest.mark.timeout(120)]


@pytest.fixture
def services(
    marked_environment: dict[str, str], python: tuple[str, str]
) -> Iterator[Callable[[str], Command]]:
    """Start a user's service in a folder of this user, with its control socket."""
    with tempfile.TemporaryDirectory(prefix="socketprotector-") as name:
        Path(name).chmod(0o755)
        made: list[Start] = []

        def up(user: str) -> Command:
            folder = Path(name) / user
            folder.mkdir()
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
            made.append(Start(folder, marked_environment))
            found = Command(made[-1], python)
            words = ("--user", user, "--control", f"{folder}/control", "--handoff", "connection")
            found.up(*words, "unix:s", "--", *found.worker("minimal"))
            return found

        yield up
        for each in made:
            each.end()
            print(each.log)


def folder_of(service: Command) -> Path:
    return service.start.folder


def ctl(*words: str | Path) -> Ended:
    return run(*map(str, words))


def serves(service: Command) -> bool:
    """Whether the first generation serves still, by an answer over the control socket."""
    ended = ctl("--control", folder_of(service) / "control", "status", "--json")
    return ended.status == 0 and json.loads(ended.out)["route"] == 1


@pytest.mark.parametrize("place", ["socket", "folder"])
@pytest.mark.parametrize("command", ["reload", "stop"])
def test_a_link_to_another_service_is_not_followed(
    services: Callable[[str], Command], place: str, command: str
) -> None:
    web, bank = services(A), services(B)
    path = folder_of(web) / "control"
    if place == "socket":
        path.rename(path.with_name("own"))
        path.symlink_to(folder_of(bank) / "control")
    else:
        path = folder_of(web) / "away" / "control"
        path.parent.symlink_to(folder_of(bank))
        os.chown(path.parent, pwd.getpwnam(A).pw_uid, -1, follow_symlinks=False)

    ended = ctl("--control", path, command)

    assert ended.status not in (0, 3)
    assert "another user can make this path lead elsewhere" in ended.err
    assert serves(bank)


@pytest.mark.parametrize("how", ["number", "link"])
def test_a_pid_file_leads_to_no_process_of_another_user(
    services: Callable[[str], Command], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    web, bank = services(A), services(B)
    # The usual folder of control sockets, which `--pid-file` searches.
    runtime = folder_of(bank) / "runtime"
    usual = runtime / "socketprotector"
    usual.mkdir(parents=True)
    (folder_of(bank) / "control").rename(usual / "bank.control")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    file, own = folder_of(web) / "pid", folder_of(web) / "pid.own"
    own.write_text(file.read_text())
    if how == "number":
        file.write_text(f"{bank.start.pid}\n")
    else:
        file.unlink()
        file.symlink_to(bank.start.pid_file)
        os.chown(file, pwd.getpwnam(A).pw_uid, -1, follow_symlinks=False)

    refused = ctl("--pid-file", file, "reload")
    control = ctl("--pid-file", bank.start.pid_file, "status")
    own.rename(file)

    assert refused.status == 2
    assert "another" in refused.err
    assert control.status == 0, control
    assert f"serving, pid {bank.start.pid}" in control.out


def test_the_pid_file_belongs_to_the_protectors_user(services: Callable[[str], Command]) -> None:
    web = services(A)

    assert web.start.pid_file.owner() == A
