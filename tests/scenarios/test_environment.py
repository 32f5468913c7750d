"""What workers find in their environment: the caller's, their user's, and what is given to them."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.running import Protector, eventually

Start = Callable[..., Protector]
_SAYS = 'cat /proc/$$/environ >"$1.new"; mv "$1.new" "$1"; exec sleep 1000'
needs_root = needs.ANOTHER_USER


def told(path: Path) -> dict[str, str]:
    """Return what the newest worker was started with."""
    words = path.read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if word)


def environment(protector: Start, folder: Path, *options: str, **given: str) -> dict[str, str]:
    folder.chmod(0o777)
    said = folder / "said"
    command = ("/bin/sh", "-c", _SAYS, "sh", str(said))
    protector(*options, "--ready", "after:1ms", "127.0.0.1:0", "--", *command, **given).ready()
    eventually(said.exists, "what it has found")
    return told(said)


@pytest.fixture
def folder() -> Path:
    """One that any user can write to."""
    return Path(os.environ["XDG_RUNTIME_DIR"])


@needs_root
@pytest.mark.parametrize("option", ["--user", "--worker-user"])
def test_a_worker_of_another_user_finds_its_own_home_and_name(
    protector: Start, folder: Path, option: str
) -> None:
    who = pwd.getpwnam("games")
    options = ("--user", "nobody") if option == "--worker-user" else ()

    found = environment(protector, folder, *options, option, "games", HOME="/root", USER="root")

    assert (found["HOME"], found["SHELL"]) == (who.pw_dir, who.pw_shell)
    assert (found["USER"], found["LOGNAME"]) == ("games", "games")


@needs_root
def test_what_is_given_by_name_wins_over_what_the_user_has(protector: Start, folder: Path) -> None:
    found = environment(protector, folder, "--user", "games", "--env", "HOME=/srv/app")

    assert found["HOME"] == "/srv/app"


def test_without_a_user_it_is_the_callers(protector: Start, folder: Path) -> None:
    found = environment(protector, folder, HOME="/somewhere", USER="somebody")

    assert (found["HOME"], found["USER"]) == ("/somewhere", "somebody")


def test_a_command_is_looked_for_where_workers_look_for_it(
    protector: Start, tmp_path: Path
) -> None:
    """A start would look for it there, so --check does."""
    (tmp_path / "daemon").write_text("#!/bin/sh\n")
    (tmp_path / "daemon").chmod(0o755)
    command = ("--check", "127.0.0.1:0", "--", "daemon")
    path = f"{tmp_path}:{os.environ['PATH']}"

    assert protector(*command, PATH=path).wait() == 0
    cleared = protector("--clear-env", *command, PATH=path)

    assert cleared.wait() == 2
    assert "cannot run daemon" in cleared.log.text()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--clear-env"], {"PATH"}),
        (["--keep-env", "COLOUR,PATH"], {"COLOUR", "PATH"}),
        (["--clear-env", "--keep-env", "COLOUR, NOT_THERE"], {"COLOUR", "PATH"}),
    ],
)
def test_workers_get_no_more_of_the_callers_than_is_asked_for(
    protector: Start, folder: Path, options: list[str], kept: set[str]
) -> None:
    found = environment(protector, folder, *options, "--env", "OWN=1", COLOUR="blue", SECRET="x")

    assert found["OWN"] == "1"
    theirs = {name for name in found if not name.startswith("SOCKETPROTECTOR_")}
    assert theirs == kept | {"OWN", "NOTIFY_SOCKET", "PWD"}
    assert (found["PATH"] == os.environ["PATH"]) == (options[-1] == "COLOUR,PATH")
    assert "SOCKETPROTECTOR_CHANNEL" in found


def test_a_worker_finds_what_its_options_mean_for_it(protector: Start, folder: Path) -> None:
    """docs/protocol.md promises these texts to workers without the library."""
    found = environment(protector, folder, "--watchdog", "500ms", "--log-prefix", "--workers", "1")

    assert found["WATCHDOG_USEC"] == "500000"
    assert found["SOCKETPROTECTOR_LOG_PREFIX"] == "1"
