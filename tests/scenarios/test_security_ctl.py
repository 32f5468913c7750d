"""A service's user against another's socketprotectorctl: its own paths lead to another service."""

from __future__ import annotations

import grp
import json
import os
import pwd
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.namespaces import STRANGER, in_user_namespace
from tests.running import DEADLINE_S, WORKERS, Ended
from tests.scenarios.starting import MINIMAL, Start
from tests.scenarios.users import A, B, Command
from tests.unit.ctl.conftest import run

pytestmark = [needs.ANOTHER_USER, pytest.mark.timeout(120)]


@pytest.fixture
def services(
    marked_environment: dict[str, str], python: tuple[str, str]
) -> Iterator[Callable[..., Command]]:
    """Start a user's service in a folder of this user, with its control socket."""
    with tempfile.TemporaryDirectory(prefix="socketprotector-") as name:
        Path(name).chmod(0o755)
        made: list[Start] = []

        def up(user: str, *more: str) -> Command:
            folder = Path(name) / user
            folder.mkdir()
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
            made.append(Start(folder, marked_environment))
            found = Command(made[-1], python)
            words = ("--user", user, "--control", f"{folder}/control", "--handoff", "connection")
            found.up(*words, *more, "unix:s", "--", *found.worker("minimal"))
            return found

        yield up
        for each in made:
            each.end()
            print(each.log)


Services = Callable[..., Command]


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
    services: Services, place: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    web, bank = services(A), services(B)
    # sudo may permit the service's user this command alone.
    monkeypatch.setenv("SUDO_UID", str(pwd.getpwnam(A).pw_uid))
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


def test_an_operator_of_two_services_is_not_led_from_one_to_the_other(services: Services) -> None:
    web, bank = (services(user, "--control-group", "daemon") for user in (A, B))
    path = folder_of(web) / "control"

    def operator() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [web.python, "-m", "socketprotector.ctl", "--control", path, "reload"],
            user=STRANGER,
            group=STRANGER,
            extra_groups=[grp.getgrnam("daemon").gr_gid],
            env={**os.environ, "PYTHONPATH": web.path},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )

    permitted = operator()
    path.rename(path.with_name("own"))
    path.symlink_to(folder_of(bank) / "control")
    misled = operator()

    assert permitted.returncode == 0, permitted.stderr
    assert misled.returncode == 100
    assert "another user can make this path lead elsewhere" in misled.stderr
    assert serves(bank)


def test_root_of_a_user_namespace_reaches_its_service(
    marked_environment: dict[str, str], python: tuple[str, str]
) -> None:
    """The owner of / has no number there."""
    with tempfile.TemporaryDirectory(prefix="socketprotector-") as folder:
        os.chown(folder, 100_000, 100_000)
        program = f"{python[0]} -m socketprotector"
        options = "--name web --control control --pid-file pid --log-file log --handoff connection"
        script = (
            f"cd {folder} || exit; stat -c %u /; "
            f"{program} {options} unix:s -- {python[0]} -S -E {WORKERS}/minimal.py >&2; "
            f"{program}.ctl --control control ready; "
            f"{program}.ctl --control control stop >&2 || kill -INT $(cat pid)"
        )
        with in_user_namespace("/bin/sh", "-c", script, environment=marked_environment) as root:
            told = root.communicate(timeout=DEADLINE_S)[0].decode().splitlines()

    assert told == ["65534", "ready: generation 1 is serving"]


def test_root_reaches_its_service_in_a_folder_that_every_user_may_change(
    start: Start, tmp_path: Path
) -> None:
    """As an emptyDir of Kubernetes is."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    words = ("--control", str(shared / "control"), "--handoff", "connection")
    start.up(*words, "unix:s", "--", *MINIMAL)

    ended = ctl("--control", shared / "control", "reload")

    assert ended.status == 0, ended


@pytest.mark.parametrize("how", ["number", "link"])
def test_a_pid_file_leads_to_no_process_of_another_user(
    services: Services, how: str, monkeypatch: pytest.MonkeyPatch
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


def test_the_pid_file_belongs_to_the_protectors_user(services: Services) -> None:
    web = services(A)

    assert web.start.pid_file.owner() == A
