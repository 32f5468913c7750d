"""Started by the code of an earlier commit and upgraded to this one under load: no client fails.

The code is replaced below the running processes.  Those of the guard, the relay, the watcher, the
adapters and the workers go on with the old code that they have in memory; what is executed from
then on by the old paths is this code.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.c.building import compiled, shared_folder
from tests.load import Load
from tests.running import MARK, Client, Protector, ask, marked
from tests.scenarios.adopting import at_rest, served, upgrade
from tests.scenarios.earlier import Earlier, extracted_once, killed, load_on, upgraded
from tests.scenarios.operating import Line
from tests.scenarios.starting import shown
from tests.scenarios.tools import (
    EITHER_HANDOFF,
    library_worker,
    pid_in,
    spawned,
    worker,
)

#: The oldest one from which an upgrade in place is promised.
COMMIT = "eefeebc5b2d2ccd7d02d7c42d6a4a4099953090e"
#: The last one whose generations have a channel, whoever accepts.
WITH_CHANNELS = "fce9e2f9e24dc0bf2cf6e9a141f26a2dccc7ee06"
EITHER_COMMIT = pytest.mark.parametrize("extracted", [COMMIT, WITH_CHANNELS], indirect=True)
MANY = worker("many")
#: Of a canary that a busy machine must not end before another program does; below DEADLINE_S.
STAGE_S = 20
#: Answers each line as the load client expects it.
TALKS = 'while read -r line; do echo "[$$] $line"; done'


@pytest.fixture(scope="session")
def extracted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The earlier code, once for all processes that pytest runs in: it is compiled once."""
    commit = getattr(request, "param", COMMIT)
    return extracted_once(commit, shared_folder(tmp_path_factory))


def here(daemon: Protector) -> tuple[str, int]:
    return "127.0.0.1", daemon.port


# -- connections -----------------------------------------------------------------------


@EITHER_COMMIT
@EITHER_HANDOFF
@pytest.mark.costly
def test_an_upgrade_and_reloads_under_load_fail_no_client(earlier: Earlier, handoff: str) -> None:
    """Where connections are handed over, by workers on the client library of the same code."""
    command = library_worker("echo") if handoff == "connection" else MANY
    daemon = earlier.start("--workers", "2", "127.0.0.1:0", "--", *command)

    with load_on(daemon) as load, Client(here(daemon)) as held:
        first = pid_in(held.ask())
        earlier.replace()
        daemon.reload()  # by the old protector: workers of both codes now
        served(load)
        upgraded(daemon)
        served(load)
        daemon.reload()
        served(load)
        assert pid_in(held.ask()) == first
    seen = load.snapshot()

    assert seen.failures == ()
    assert seen.connections == seen.begun
    daemon.stop()


@EITHER_COMMIT
@EITHER_HANDOFF
@pytest.mark.costly
def test_the_guard_of_then_goes_on_with_an_upgraded_protector_and_starts_it_after_a_kill(
    earlier: Earlier, handoff: str, tmp_path: Path
) -> None:
    daemon = guarded(earlier, tmp_path)

    with load_on(daemon) as load:
        served(load)
        earlier.replace()
        upgraded(daemon)
        served(load)
        daemon.reload()
        served(load)
        assert load.snapshot().failures == ()
        killed(daemon)
        served(load, 32)  # each that was open at the kill has ended since
        daemon.reload()
        served(load)

    goes_on_to_stop(daemon, load, handoff, tmp_path)


@EITHER_COMMIT
@EITHER_HANDOFF
@pytest.mark.costly
def test_the_guard_of_then_starts_the_new_code_where_the_old_protector_is_killed(
    earlier: Earlier, handoff: str, tmp_path: Path
) -> None:
    daemon = guarded(earlier, tmp_path)

    with load_on(daemon) as load:
        served(load)
        earlier.replace()
        killed(daemon)
        served(load, 32)
        daemon.reload()
        upgraded(daemon)
        served(load)

    goes_on_to_stop(daemon, load, handoff, tmp_path)


def guarded(earlier: Earlier, folder: Path) -> Protector:
    options = ("--guard", "--pid-file", folder / "pid", "--workers", "2")
    daemon = earlier.start(*options, "127.0.0.1:0", "--", *MANY)
    at_rest(daemon)  # the guard knows that it has accepted
    return daemon


def goes_on_to_stop(daemon: Protector, load: Load, handoff: str, folder: Path) -> None:
    """One kill has cost one connection at most, the undelivered one; all that was there is gone."""
    failures = load.snapshot().failures
    assert len(failures) <= (1 if handoff == "connection" else 0), failures
    assert {failure.kind for failure in failures} <= {"reset", "empty"}
    assert (folder / "pid").read_text() == f"{daemon.pid}\n"
    daemon.stop()
    assert not (folder / "pid").exists()


# -- adapters ---------------------------------------------------------------------------


@pytest.mark.costly
def test_programs_of_stdio_go_on_and_their_pool_is_started_again(earlier: Earlier) -> None:
    words = ("--handoff", "stdio", "--shell", "--workers", "8")
    daemon = earlier.start(*words, "127.0.0.1:0", "--", TALKS)

    with Client(here(daemon)) as held:
        first = pid_in(held.ask())
        goes_on_with_adapters(daemon, earlier)
        assert pid_in(held.ask()) == first
    daemon.stop()


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(shared_folder(tmp_path_factory), "original")


@pytest.mark.costly
def test_a_daemon_of_the_original_goes_on_and_its_adapter_is_started_again(
    earlier: Earlier, original: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()
    words = ("--handoff", "legacy", f"127.0.0.1:{port}", "--", original, str(port))
    daemon = earlier.start(*words)

    goes_on_with_adapters(daemon, earlier)

    daemon.stop()


def goes_on_with_adapters(daemon: Protector, earlier: Earlier) -> None:
    """One that is killed is started as its generation was, by either protector from this code."""
    earlier.replace()
    killed_worker(daemon)
    with load_on(daemon) as load:
        served(load)
        upgraded(daemon)
        served(load)
    assert load.snapshot().failures == ()

    killed_worker(daemon)
    with load_on(daemon) as load:
        served(load)
        daemon.reload()
        served(load)
    assert load.snapshot().failures == ()


def killed_worker(daemon: Protector) -> None:
    """Kill the last worker, and wait until another is ready."""
    mark = len(daemon.log.seen)
    os.kill(spawned(daemon)[-1], signal.SIGKILL)
    daemon.log.wait_for("event=worker-ready", after=mark)


# -- helper processes ---------------------------------------------------------------------


class Configuration:
    """A configuration file, put there whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def says(self, *listens: str) -> None:
        new = self.path.with_suffix(".new")
        words = json.dumps(worker("prints"))
        new.write_text(f"listen = {json.dumps(listens)}\ncommand = {words}\n")
        new.rename(self.path)


@pytest.mark.costly
def test_relay_watcher_and_configuration_reader_are_found_by_the_paths_of_then(
    earlier: Earlier,
    tmp_path: Path,
    free_port: Callable[[], int],
    marked_environment: dict[str, str],
) -> None:
    needs.module("watchfiles")
    source = tmp_path / "source"
    source.mkdir()
    first, second = f"127.0.0.1:{free_port()}", free_port()
    configuration = Configuration(tmp_path / "web.toml")
    configuration.says(first)
    options = ("--config", configuration.path, "--log-prefix", "--watch", source)
    daemon = earlier.start(*options)
    daemon.log.wait_for("event=watching")

    def helper(name: str) -> int:
        [pid] = [p for p in marked(marked_environment[MARK]) if f"/{name}.py " in shown(p)]
        return pid

    def relayed() -> None:
        """What a worker prints arrives, from here on."""
        daemon.log.wait_for(r"hello \d+$", after=len(daemon.log.seen))

    def changed(name: str) -> None:
        """What is changed is seen, and leads to a reload."""
        mark = len(daemon.log.seen)
        (source / name).write_text("pass\n")
        daemon.log.wait_for("event=(?:files-)?changed", after=mark)  # earlier: changed
        daemon.log.wait_for("event=reloaded", after=mark)

    with load_on(daemon) as load:
        relayed()
        earlier.replace()
        mark = len(daemon.log.seen)
        os.kill(helper("log_relay"), signal.SIGKILL)
        os.kill(helper("file_watch"), signal.SIGKILL)
        daemon.log.wait_for("event=relay-ended", after=mark)
        relayed()
        daemon.log.wait_for("event=watching", after=mark)
        configuration.says(first, f"127.0.0.1:{second}")
        daemon.reload()
        assert pid_in(ask(("127.0.0.1", second))) in spawned(daemon)
        before = helper("log_relay"), helper("file_watch")

        upgraded(daemon)

        relayed()
        changed("a.py")
        configuration.says(first)
        daemon.reload()
        assert (helper("log_relay"), helper("file_watch")) == before
        served(load)
    assert load.snapshot().failures == ()
    daemon.stop()


@EITHER_COMMIT
@pytest.mark.parametrize("handoff", ["listener"])
@pytest.mark.costly
def test_generations_at_a_unix_path_have_a_socket_each_from_the_next_reload_on(
    earlier: Earlier, handoff: str, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    daemon = earlier.start("--guard", "--workers", "2", f"unix:{path}", "--", *MANY)
    at_rest(daemon)
    with Load(f"unix:{path}") as load:
        served(load)
        earlier.replace()
        upgraded(daemon)
        served(load)
        for _ in range(2):
            daemon.reload()
            served(load)
        killed(daemon)
        daemon.reload()
        served(load)
    files = sorted(each.name for each in tmp_path.glob(".s.sp-*"))
    daemon.stop()

    assert load.snapshot().failures == ()
    assert len(files) == 2
    assert list(tmp_path.glob(".s*")) == []
    assert not path.exists()


@EITHER_COMMIT
@pytest.mark.parametrize("handoff", ["listener"])
@pytest.mark.parametrize("began", ["with this code", "earlier"])
@pytest.mark.costly
def test_a_program_that_knows_one_socket_for_a_path_refuses_to_go_on_with_several(
    earlier: Earlier, handoff: str, tmp_path: Path, began: str
) -> None:
    path = tmp_path / "s"
    words = ("--workers", "2", f"unix:{path}", "--", *MANY)
    if began == "earlier":
        daemon = earlier.start(*words)
        earlier.replace()
        upgraded(daemon)
        daemon.reload()
    else:
        earlier.replace()
        daemon = earlier.start(*words)
    with Load(f"unix:{path}") as load:
        served(load)
        earlier.put_back()
        refusal = upgrade(daemon)
        served(load)
        earlier.replace()
        daemon.reload()
        upgraded(daemon)
        served(load)
    daemon.stop()

    assert "written by a newer program (this one does not know beside)" in refusal
    assert load.snapshot().failures == ()


# -- rollouts -----------------------------------------------------------------------------


@EITHER_COMMIT
@EITHER_HANDOFF
@pytest.mark.parametrize(
    "options", [("--canary", "5%"), ("--reload-order", "rolling", "--drain-timeout", "9s")]
)
@pytest.mark.costly
def test_a_program_that_knows_no_rollouts_refuses_settings_that_order_them(
    earlier: Earlier, handoff: str, options: tuple[str, ...]
) -> None:
    earlier.replace()
    daemon = earlier.start("--workers", "2", *options, "127.0.0.1:0", "--", *library_worker("echo"))
    with load_on(daemon) as load:
        served(load)
        earlier.put_back()
        refusal = upgrade(daemon)
        served(load)
        earlier.replace()
        upgraded(daemon)
        served(load)
    daemon.stop()

    assert "event=upgrade-failed" in refusal
    assert "written by a newer program (this one does not know" in refusal
    assert load.snapshot().failures == ()


@pytest.mark.slow
@EITHER_COMMIT
@pytest.mark.costly
def test_a_program_that_knows_no_rollouts_ends_one_at_the_new_generation(
    earlier: Earlier, place: Path
) -> None:
    earlier.replace()
    words = ("--control", place, "--workers", "2", "--settle", "1h", "127.0.0.1:0", "--")
    daemon = earlier.start(*words, *library_worker("echo"))
    with load_on(daemon) as load, Line(place) as line:
        served(load)
        line.ask("reload", canary={"share": "50%", "for_s": STAGE_S})
        daemon.log.wait_for("event=route generation=1 sharing=2 share=50%")
        served(load)
        earlier.put_back()
        mark = len(daemon.log.seen)

        daemon.signal(signal.SIGUSR2)

        daemon.log.wait_for("event=(resumed|adopted) ", after=mark)  # earlier: adopted
        daemon.log.wait_for("event=route generation=2$", after=mark)
        served(load)
    # To the earlier program the rest of the stage is the rest of --settle.
    daemon.log.wait_for("event=reloaded generation=2", after=mark)
    daemon.log.wait_for("event=drained generation=1", after=mark)
    assert {pid_in(ask(here(daemon))) for _ in range(6)} <= {*spawned(daemon, 2)}
    daemon.stop()

    assert load.snapshot().failures == ()
