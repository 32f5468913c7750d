"""`--handoff stdio` and `--handoff legacy` as options: a program of ours stands in between.

What the two programs themselves do is in tests/stdio and tests/legacy.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.c.building import compiled, shared_folder
from tests.load import Load
from tests.rounds import rounds
from tests.running import Client, Protector, ask, wait_gone
from tests.scenarios.adopting import at_rest, kill_protector, revived, served, upgrade
from tests.scenarios.operating import Operating
from tests.scenarios.starting import Start
from tests.scenarios.tools import Release, spawned

Starter = Callable[..., Protector]
STDIO = ("--handoff", "stdio")
CAT = "/bin/cat"
#: Answers each line as the load client expects it.
TALKS = 'while read -r line; do echo "[$$] $line"; done'


def here(daemon: Protector) -> tuple[str, int]:
    return "127.0.0.1", daemon.port


# -- stdio -----------------------------------------------------------------------


def test_a_connection_is_stdin_and_stdout_of_a_program(protector: Starter) -> None:
    daemon = protector(*STDIO, "127.0.0.1:0", "--", CAT).ready()

    assert ask(here(daemon)) == "hello"
    assert len(spawned(daemon)) == min(4, os.cpu_count() or 1)  # four programs at once
    daemon.stop()


def test_workers_is_how_many_programs_run_at_once(protector: Starter) -> None:
    daemon = protector(*STDIO, "--workers", "2", "127.0.0.1:0", "--", CAT).ready()
    held = [Client(here(daemon)) for _ in range(2)]
    assert [each.ask() for each in held] == ["hello"] * 2

    with Client(here(daemon), "third") as third:
        held.pop().close()  # a place is free the moment a program ends
        assert third.hear() == "third"

    held.pop().close()


def test_the_shell_may_run_it(protector: Starter) -> None:
    words = (*STDIO, "--shell", "127.0.0.1:0", "--", "read line; echo $line | tr a-z A-Z")
    daemon = protector(*words).ready()

    assert ask(here(daemon)) == "HELLO"


def test_nothing_of_a_shell_s_command_is_shown(operated: Operating) -> None:
    words = (*STDIO, "--shell")
    daemon = operated(*words, command=("cat; : secret",))

    assert (daemon.status()["name"], daemon.status()["command"]) == ("sh", ["sh"])
    assert "secret" not in Path(f"/proc/{daemon.daemon.pid}/cmdline").read_text()
    assert daemon.status()["handoff"] == "stdio"


@pytest.mark.parametrize("command", [("cat", "-n"), ("",)], ids=["two", "empty"])
def test_the_shell_s_command_is_one_word(start: Start, command: tuple[str, ...]) -> None:
    ended = start(*STDIO, "--shell", "127.0.0.1:0", "--", *command)

    assert (ended.status, len(ended.lines)) == (2, 1)
    assert "--shell takes COMMAND as one word, in quotes" in ended.lines[0]


@pytest.mark.slow
@pytest.mark.costly
def test_reloads_of_programs_under_load_fail_no_client(protector: Starter) -> None:
    words = (*STDIO, "--shell", "--workers", "8", "127.0.0.1:0", "--", TALKS)
    daemon = protector(*words).ready()

    with Load(f"127.0.0.1:{daemon.port}", concurrency=8) as load:
        for _ in range(rounds(3, 20)):
            daemon.reload()
            served(load)

    assert not load.snapshot().failures


def test_a_reload_lets_programs_go_on_and_starts_what_is_there_now(
    protector: Starter, tmp_path: Path
) -> None:
    release = Release(tmp_path / "program")
    release.write("#!/bin/sh\nwhile read -r line; do echo one $line; done\n")
    daemon = protector(*STDIO, "127.0.0.1:0", "--", release.path).ready()
    with Client(here(daemon)) as old:
        assert old.ask() == "one hello"
        release.write("#!/bin/sh\nwhile read -r line; do echo two $line; done\n")
        daemon.reload()

        assert ask(here(daemon)) == "two hello"
        assert old.ask() == "one hello"
    assert wait_gone(spawned(daemon, 1)) == []


@pytest.mark.costly
def test_a_program_that_is_missing_fails_the_reload(protector: Starter, tmp_path: Path) -> None:
    release = Release(tmp_path / "program")
    release.becomes(CAT)
    daemon = protector(*STDIO, "127.0.0.1:0", "--", release.path).ready()
    release.path.unlink()

    mark = daemon.signal(signal.SIGHUP)
    line = daemon.log.wait_for("event=reload-failed", after=mark)

    assert "No such file or directory" in line


def test_scaling_is_refused_in_words(operated: Operating) -> None:
    daemon = operated(*STDIO, command=(CAT,))

    with daemon.line() as line:
        code, said = line.refused("scale", by=1)
    mark = daemon.daemon.signal(signal.SIGTTIN)
    told = daemon.daemon.log.wait_for("event=refused", after=mark)

    assert code == "refused"
    assert "change `workers` in the configuration file and reload" in said
    assert said in told


@pytest.mark.costly
def test_programs_survive_the_protector_and_its_upgrade(protector: Starter) -> None:
    daemon = protector("--guard", *STDIO, "127.0.0.1:0", "--", CAT).ready()
    with Client(here(daemon)) as client:
        assert client.ask() == "hello"
        revived(daemon, kill_protector(daemon))
        assert client.ask() == "hello"
        assert "event=resumed" in upgrade(daemon)
        assert client.ask() == "hello"
    assert ask(here(daemon)) == "hello"
    at_rest(daemon)
    daemon.stop()


@pytest.mark.costly
def test_the_number_of_places_may_change_at_a_reload(protector: Starter, tmp_path: Path) -> None:
    config = tmp_path / "web.toml"

    def write(workers: int) -> None:
        text = f'handoff = "stdio"\nworkers = {workers}\nlisten = "127.0.0.1:0"\n'
        (tmp_path / "new").write_text(text + f'command = ["{CAT}"]\n')
        (tmp_path / "new").rename(config)

    write(1)
    daemon = protector("--config", config).ready()
    held = [Client(here(daemon))]
    assert held[0].ask() == "hello"
    write(3)
    daemon.reload()
    held += [Client(here(daemon)) for _ in range(3)]

    assert [each.ask() for each in held] == ["hello"] * 4  # the old one goes on beside three
    for each in held:
        each.close()


# -- legacy ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(shared_folder(tmp_path_factory), "original")


@pytest.mark.costly
def test_a_daemon_of_the_original_serves_and_is_reloaded(
    protector: Starter, original: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()
    words = ("--handoff", "legacy", f"127.0.0.1:{port}", "--", original, str(port))
    daemon = protector(*words).ready()

    with Load(f"127.0.0.1:{port}", concurrency=4) as load:
        for _ in range(3):
            daemon.reload()
            served(load)

    assert not load.snapshot().failures
    daemon.stop()
