"""deploy, rollback, releases: `current` names only what was proved, and a restart starts that."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.procfs import command_line_of, environment_of
from tests.running import Protector, ask, eventually
from tests.scenarios.adopting import at_rest, kill_protector, revived, upgrade
from tests.scenarios.operating import MANY, Operated, Operating
from tests.scenarios.releases import (
    COMMAND,
    Releases,
    ctl,
    deployed,
    entries,
    saved,
    serving,
    starts,
    way,
)
from tests.scenarios.running_ctl import Running
from tests.scenarios.tools import EITHER_HANDOFF, Gate, pid_in, worker

Web = Callable[..., Operated]
Beside = Callable[..., Running]
Deploying = Callable[..., tuple[Operated, Running, Gate]]


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(tmp_path / "srv")


@pytest.fixture
def web(operated: Operating, releases: Releases) -> Web:
    """Start a protector with releases: web(*options, command=...)."""

    def start(*options: str | Path, command: tuple[str, ...] = COMMAND) -> Operated:
        one = operated(*releases.options, *options, command=command)
        saved(one)
        return one

    return start


@pytest.fixture
def beside() -> Iterator[Beside]:
    """Run a command beside the test: beside(operated, *words)."""
    started: list[Running] = []

    def start(one: Operated, *words: str) -> Running:
        started.append(Running("--control", str(one.path), *words))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture
def deploying(web: Web, releases: Releases, tmp_path: Path, beside: Beside) -> Deploying:
    """Start a protector that deploys a release, which is ready when its gate is open.

    deploying(*options) returns both, and the gate.
    """

    def start(*options: str | Path) -> tuple[Operated, Running, Gate]:
        gate = Gate(tmp_path / "gate")
        releases.add("gated", *worker("ready_at_gate", gate.path))
        one = web(*options)
        running = beside(one, "deploy", "gated")
        starts(one, 2)
        return one, running, gate

    return start


# -- a deploy -----------------------------------------------------------------------------


@EITHER_HANDOFF
def test_a_good_release_serves_and_current_names_it(web: Web, releases: Releases) -> None:
    one = web()
    assert serving(one) == "1"

    ended = ctl(one, "deploy", "2")

    assert ended.status == 0, ended
    assert ended.out == (
        "deployed: release 2 (before: 1); generation 2 is serving in place of generation 1\n"
    )
    assert (serving(one), releases.named) == ("2", "2")
    pid = pid_in(ask(one.address))
    assert environment_of(pid)["SOCKETPROTECTOR_RELEASE"] == "2"
    assert sorted(os.listdir(releases.live)) == ["current", "current.history", "current.lock"]
    one.daemon.log.wait_for(r"event=reloaded generation=2 release=2\b")
    one.daemon.stop()


def test_a_bad_release_changes_nothing(web: Web, releases: Releases) -> None:
    one = web()
    link = os.readlink(releases.current)
    ended = ctl(one, "deploy", "bad")

    assert ended.status == 3, ended
    assert "release bad not deployed: generation 2 failed: " in ended.err
    assert ended.err.endswith("generation 1 is still serving\n  | no such table\n")
    assert (serving(one), os.readlink(releases.current)) == ("1", link)
    whole = ["current", "current.history", "current.lock"]
    eventually(lambda: sorted(os.listdir(releases.live)) == whole, "the history is written")
    assert one.status()["warnings"] == []
    one.daemon.stop()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nosuch", "release .*/nosuch: No such file or directory"),
        ("link", "it is no folder; a link is not followed"),
        ("open", r"release.*open \(drwxrwxrwx\): other users can write it"),
    ],
)
@pytest.mark.costly
def test_a_release_that_may_not_start_is_refused(
    web: Web, releases: Releases, name: str, why: str
) -> None:
    one = web()
    (releases.folder / "link").symlink_to("2")
    releases.add("open", *MANY)
    (releases.folder / "open").chmod(0o777)

    ended = ctl(one, "deploy", name)

    assert ended.status == 3, ended
    assert re.search(why, ended.err), ended
    assert (serving(one), releases.named) == ("1", "1")
    one.daemon.stop()


@pytest.mark.parametrize("words", [("deploy", "2"), ("deploy", "2", "--dry-run"), ("reload",)])
@pytest.mark.costly
def test_a_folder_of_current_that_a_restart_would_refuse_is_refused(
    web: Web, releases: Releases, words: tuple[str, ...]
) -> None:
    one = web()
    releases.live.chmod(0o775)

    ended = ctl(one, *words)

    assert ended.status == 3, ended
    said = (
        f"--current {releases.current}: other users can write {releases.live} (drwxrwxr-x); "
        f"chmod go-w {releases.live}"
    )
    assert said in ended.err
    assert (serving(one), releases.named) == ("1", "1")
    assert not one.daemon.log.count("event=spawned generation=2")
    [known] = one.line().ask("releases")["releases"]
    assert (known["release"], known["refused_at"]) == ("1", None)
    releases.live.chmod(0o755)
    deployed(one, "2")
    one.daemon.stop()


@pytest.mark.parametrize("name", ["../2", "/etc", "2/", ".", "a b", "x" * 129])
def test_a_name_that_is_none_reaches_no_protector(web: Web, name: str) -> None:
    one = web()
    ended = ctl(one, "deploy", name)
    assert (ended.status, "write a name of 1 to 128 letters" in ended.err) == (2, True), ended
    assert one.line().refused("deploy", release=name)[0] == "invalid"
    assert one.line().refused("deploy")[0] == "invalid"
    one.daemon.stop()


@pytest.mark.costly
def test_current_moves_only_when_the_release_has_settled(
    web: Web, releases: Releases, beside: Beside
) -> None:
    one = web("--settle", "1h")
    running = beside(one, "deploy", "2")
    one.until("phase", "settling")
    one.until("route", 2)
    assert releases.named == "1"

    assert ctl(one, "promote").status == 0

    assert running.wait() == 0, running.err.text()
    assert releases.named == "2"
    one.daemon.stop()


@pytest.mark.costly
def test_a_release_that_fails_while_it_settles_leaves_current(
    web: Web, releases: Releases, beside: Beside
) -> None:
    one = web("--settle", "1h")
    running = beside(one, "deploy", "2")
    one.until("route", 2)

    os.kill(one.pids(2)[0], signal.SIGKILL)

    assert running.wait() == 3, running.err.text()
    assert (serving(one), releases.named) == ("1", "1")
    one.daemon.stop()


@pytest.mark.costly
def test_a_stop_during_a_canary_leaves_current(
    web: Web, releases: Releases, beside: Beside
) -> None:
    one = web("--canary", "50%", "--canary-for", "1h")
    running = beside(one, "deploy", "2")
    one.until("phase", "settling")

    one.daemon.stop()

    assert running.wait() == 3, running.err.text()
    assert releases.named == "1"


@pytest.mark.costly
def test_each_part_of_the_service_takes_its_generations_release(
    web: Web, releases: Releases
) -> None:
    one = web()
    deployed(one, "2")
    releases.point_at("3")

    os.kill(one.pids(2)[0], signal.SIGKILL)  # respawned
    one.daemon.log.wait_for(r"event=spawned generation=2 worker=3 ")
    one.until_generation(2, phase="serving")
    assert ctl(one, "scale", "2").status == 0
    eventually(lambda: len(one.pids(2)) == 2, "two workers")
    assert ctl(one, "replace", "generation:2").status == 0  # renewed
    one.until("route", 3)

    assert serving(one) == "2"
    assert releases.named == "3"
    one.daemon.stop()


@pytest.mark.costly
def test_checks_know_the_release(web: Web, releases: Releases, tmp_path: Path) -> None:
    def check(name: str) -> str:
        return f"check:echo $SOCKETPROTECTOR_RELEASE {{release}} >> {tmp_path / name}"

    def last(name: str) -> str:
        seen = tmp_path / name
        return seen.read_text().splitlines()[-1] if seen.exists() else ""

    one = web(
        *("--ready", check("ready"), "--settle", "1s", "--settle-check", check("settle")),
        *("--health", check("health"), "--health-every", "100ms"),
    )
    eventually(lambda: last("health") == f"1 {releases.folder}/1", "health of release 1")

    deployed(one, "2")

    new = f"2 {releases.folder}/2"
    assert (last("ready"), last("settle")) == (new, new)
    eventually(lambda: last("health") == new, "health of release 2")
    assert ctl(one, "deploy", "bad").status == 3
    (tmp_path / "health").unlink()
    eventually(lambda: last("health") == new, "health of the release that is still serving")
    one.daemon.stop()


@pytest.mark.costly
def test_the_path_comes_to_command_folder_and_variables(web: Web, releases: Releases) -> None:
    for name in ("1", "2"):
        (releases.folder / name / "vars").write_text(f"V={name}\n")
    one = web(
        *("--chdir", "{release}", "--env", "ROOT={release}", "--env-file", "{release}/vars"),
        command=("{release}/daemon", "x={release}"),
    )
    deployed(one, "2")

    [pid] = one.pids(2)
    found, path = environment_of(pid), f"{releases.folder}/2"
    assert (found["ROOT"], found["V"], found["PWD"]) == (path, "2", path)
    assert os.readlink(f"/proc/{pid}/cwd") == path
    assert "many.py" in command_line_of(pid)
    one.daemon.stop()


@pytest.mark.costly
def test_a_start_by_the_guard_takes_the_generations_release(web: Web, releases: Releases) -> None:
    one = web("--guard")
    deployed(one, "2")
    releases.point_at("3")
    at_rest(one.daemon)

    [pid] = one.pids(2)
    mark = kill_protector(one.daemon)
    os.kill(pid, signal.SIGKILL)
    revived(one.daemon, mark)

    one.until("restarts", 1)
    eventually(lambda: bool(one.pids(2)) and one.pids(2) != [pid], "another worker")
    one.until("phase", "serving")
    assert (serving(one), releases.named) == ("2", "3")
    assert "current names 3, and 2 is serving; a restart starts 3" in one.status()["warnings"]
    one.daemon.stop()


# -- current, moved by somebody -------------------------------------------------------------


@pytest.mark.costly
def test_a_reload_tries_what_current_names(web: Web, releases: Releases) -> None:
    one = web()
    releases.point_at("2")
    assert ctl(one, "reload").status == 0
    assert serving(one) == "2"
    releases.point_at("bad")

    ended = ctl(one, "reload")

    said = "current names bad, which failed; a restart would start bad"
    assert ended.status == 3, ended
    assert said in ended.err
    assert one.status()["warnings"] == [said]
    assert (
        one.status()["reloads"][-1]["reason"]
        .partition("\n")[0]
        .endswith(f"{said}; its last words:")
    )
    assert said in ctl(one, "status").out
    assert (serving(one), releases.named) == ("2", "bad")
    one.daemon.stop()


def test_a_deploy_while_current_names_another_needs_force(web: Web, releases: Releases) -> None:
    one = web()
    releases.point_at("3")

    ended = ctl(one, "deploy", "2")

    assert ended.status == 2, ended
    assert (
        "/current names 3, but 1 is serving; see "
        f"`socketprotectorctl --control {one.path} releases`, and use --force" in ended.err
    )
    assert "current names 3, and 1 is serving; a restart starts 3" in one.status()["warnings"]
    assert releases.named == "3"
    deployed(one, "2", "--force")
    assert (serving(one), releases.named, one.status()["warnings"]) == ("2", "2", [])
    assert not one.status()["reloads"][-1]["reason"]
    assert one.daemon.log.count("event=current-moved-again") == 0
    one.daemon.stop()


@pytest.mark.costly
def test_a_remembered_reload_finds_current_moved(deploying: Deploying, releases: Releases) -> None:
    one, running, gate = deploying()
    one.daemon.signal(signal.SIGHUP)
    one.until("reload_wanted", True)

    gate.stay_open()

    assert running.wait() == 0, running.err.text()
    one.until("route", 3)
    assert (serving(one), releases.named) == ("gated", "gated")
    one.daemon.stop()


@pytest.mark.costly
def test_a_current_that_is_moved_during_a_deploy_is_moved_again_and_that_is_said(
    web: Web, releases: Releases, beside: Beside
) -> None:
    one = web("--settle", "1h")
    running = beside(one, "deploy", "2", "--json")
    one.until("route", 2)
    releases.point_at("3")

    assert ctl(one, "promote").status == 0

    assert running.wait() == 0, running.err.text()
    said = "current was moved to 3 during the reload; it names 2 now"
    one.daemon.log.wait_for(f'warning event=current-moved-again release=2 reason="{said}"')
    assert one.status()["reloads"][-1]["reason"] == said
    assert (serving(one), releases.named) == ("2", "2")
    one.daemon.stop()


@pytest.mark.costly
def test_a_current_that_is_moved_during_a_reload_stays_and_that_is_said(
    web: Web, releases: Releases
) -> None:
    one = web("--settle", "1h")
    releases.point_at("2")
    one.daemon.signal(signal.SIGHUP)
    one.until("route", 2)
    releases.point_at("3")
    one.daemon.signal(signal.SIGHUP)

    assert ctl(one, "promote").status == 0

    one.until("route", 3)  # the second reload
    assert ctl(one, "promote").status == 0
    one.daemon.log.wait_for("event=reloaded generation=3 release=3")
    first, second = one.status()["reloads"][-2:]
    assert first["reason"] == "current names 3, and 2 is serving; a restart starts 3"
    assert not second["reason"]
    assert (serving(one), releases.named) == ("3", "3")
    # The history is written in another process, which a reload does not wait for.
    eventually(lambda: way(releases) == ["1", "2", "3"], "the history on disk")
    one.daemon.stop()


# -- what a deploy meets ----------------------------------------------------------------------


@pytest.mark.costly
def test_a_deploy_is_refused_while_a_reload_is_in_progress(
    web: Web, releases: Releases, beside: Beside
) -> None:
    one = web("--settle", "1h")
    one.daemon.signal(signal.SIGHUP)
    one.until("route", 2)

    ended = ctl(one, "deploy", "2")

    assert (ended.status, ended.err) == (
        6,
        "socketprotectorctl: a reload of 1 is in progress (generation 2); wait for its end, or "
        f"`socketprotectorctl --control {one.path} rollback`\n",
    )
    assert ctl(one, "promote").status == 0
    one.daemon.log.wait_for("event=reloaded generation=2")
    running = beside(one, "deploy", "2")
    one.until("route", 3)
    assert ctl(one, "promote").status == 0
    assert running.wait() == 0
    one.daemon.stop()


@pytest.mark.costly
def test_an_upgrade_during_a_deploy_goes_on_with_it(
    deploying: Deploying, releases: Releases
) -> None:
    one, running, gate = deploying()

    assert "resumed" in upgrade(one.daemon)
    gate.stay_open()

    assert running.wait() == 0, running.err.text()
    assert (serving(one), releases.named, way(releases)) == ("gated", "gated", ["1", "gated"])
    one.daemon.stop()


@pytest.mark.costly
def test_a_scale_during_a_deploy_is_for_the_release(
    deploying: Deploying, releases: Releases
) -> None:
    one, running, gate = deploying()

    assert ctl(one, "scale", "2").status == 0
    gate.stay_open()

    assert running.wait() == 0, running.err.text()
    assert len(one.pids(2)) == 2
    assert (serving(one), releases.named) == ("gated", "gated")
    one.daemon.stop()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.costly
def test_a_stop_during_a_deploy_leaves_current(
    deploying: Deploying, releases: Releases, sign: signal.Signals
) -> None:
    one, running, gate = deploying()

    one.daemon.signal(sign)

    assert one.daemon.wait() == 0
    assert running.wait() in (1, 3), running.err.text()
    assert releases.named == "1"
    assert [each["release"] for each in entries(releases)] == ["1"]
    gate.stay_open()


@pytest.mark.costly
def test_a_deploy_during_a_hold_moves_current_when_the_hold_is_over_or_before(
    web: Web, releases: Releases
) -> None:
    one = web()
    assert ctl(one, "hold", "--for", "1h").status == 0

    ended = ctl(one, "deploy", "2")

    assert (ended.status, releases.named) == (0, "2"), ended
    assert ctl(one, "release").status == 0
    assert serving(one) == "2"
    one.daemon.stop()


@pytest.mark.costly
def test_a_deploy_may_add_and_remove_listeners_and_a_bad_one_does_not(
    protector: Callable[..., Protector],
    place: Path,
    releases: Releases,
    tmp_path: Path,
    free_port: Callable[[], int],
) -> None:
    old, new = ("127.0.0.1", free_port()), ("127.0.0.1", free_port())
    config = tmp_path / "web.toml"
    config.write_text(f"listen = '127.0.0.1:{old[1]}'\n")
    words = ("--control", place, "--config", config, *releases.options, "--", *COMMAND)
    one = Operated(protector(*words), place)
    one.line()
    one.until("phase", "serving")
    config.write_text(f"listen = '127.0.0.1:{new[1]}'\n")

    assert ctl(one, "deploy", "bad").status == 3

    with pytest.raises(ConnectionRefusedError):
        ask(new)
    assert pid_in(ask(old)) in one.pids(1)
    deployed(one, "2")
    assert environment_of(pid_in(ask(new)))["SOCKETPROTECTOR_RELEASE"] == "2"
    with pytest.raises(ConnectionRefusedError):
        ask(old)
    assert releases.named == "2"
    one.daemon.stop()
    one.end()


@pytest.mark.costly
def test_a_killed_guard_ends_no_deploy(deploying: Deploying, releases: Releases) -> None:
    one, running, gate = deploying("--guard")

    os.kill(one.daemon.pid, signal.SIGKILL)
    one.daemon.log.wait_for("event=guard-died")
    [warning] = one.status()["warnings"]
    assert warning.startswith("the guard died")
    gate.stay_open()

    assert running.wait() == 0, running.err.text()
    assert (serving(one), releases.named) == ("gated", "gated")
    assert ctl(one, "rollback").status == 0
    assert releases.named == "1"
    assert ctl(one, "upgrade", "--wait").status == 0
    assert one.status()["warnings"] == [warning]
    assert ctl(one, "stop").status == 0


# -- rollback ---------------------------------------------------------------------------------


@pytest.mark.costly
def test_rollback_walks_back_and_never_to_and_fro(web: Web, releases: Releases) -> None:
    one = web()
    deployed(one, "2")
    assert ctl(one, "deploy", "bad").status == 3
    deployed(one, "3")

    for name in ("2", "1"):
        ended = ctl(one, "rollback")
        assert ended.status == 0, ended
        assert f"going back from release {int(name) + 1} to {name}\n" in ended.err
        assert (serving(one), releases.named) == (name, name)
    ended = ctl(one, "rollback")

    assert ended.status == 2, ended
    assert "nothing to roll back to: no release was proved before 1" in ended.err
    deployed(one, "3")
    assert ctl(one, "rollback").status == 0
    assert serving(one) == "1"
    one.daemon.stop()


@pytest.mark.costly
def test_rollback_passes_over_a_release_that_is_gone_or_fails_now(
    web: Web, releases: Releases
) -> None:
    one = web()
    for name in ("2", "3"):
        deployed(one, name)
    (releases.folder / "2" / "daemon").unlink()

    assert ctl(one, "rollback").status == 3  # to 2, which cannot start any more
    assert (serving(one), releases.named) == ("3", "3")
    assert ctl(one, "rollback").status == 0

    assert serving(one) == "1"
    one.daemon.stop()


@pytest.mark.costly
def test_a_mistake_in_the_configuration_is_no_failure_of_the_release(
    operated: Operating, releases: Releases, tmp_path: Path
) -> None:
    config = tmp_path / "web.toml"
    config.write_text("")
    one = operated(*releases.options, "--config", config, command=COMMAND)
    deployed(one, "2")
    deployed(one, "3")
    config.write_text("nonsense = 1\n")
    assert ctl(one, "deploy", "2").status == 3
    config.write_text("")
    found = json.loads(ctl(one, "releases", "--json").out)["releases"]
    assert [each["failed_at"] or each["refused_at"] for each in found] == [None, None, None]

    assert ctl(one, "rollback").status == 0

    assert (serving(one), releases.named) == ("2", "2")
    one.daemon.stop()


def test_rollback_ends_a_deploy(deploying: Deploying, releases: Releases) -> None:
    one, running, gate = deploying()

    wrong = ctl(one, "rollback", "--expect", "1")
    right = ctl(one, "rollback", "--expect", "gated")

    assert (wrong.status, wrong.err) == (
        2,
        "socketprotectorctl: expected release 1, but found gated\n",
    )
    assert (right.status, right.out) == (0, "rolled back: generation 2 gets no new clients\n")
    assert running.wait() == 3
    assert "rolled back: an operator called it off" in running.err.text()
    assert (serving(one), releases.named) == ("1", "1")
    gate.stay_open()
    one.daemon.stop()


def test_a_rollback_during_settle_names_both_generations_and_releases(
    web: Web, beside: Beside
) -> None:
    """The generation that it calls off has the route."""
    one = web("--settle", "1h")
    running = beside(one, "deploy", "2")
    eventually(lambda: one.status()["route"] == 2, "generation 2 has the route")

    ended = ctl(one, "rollback", "--json")

    result = json.loads(ended.out)
    assert (result["from"], result["generation"]) == (1, 2), result
    assert (result["from_release"], result["release"]) == ("1", "2"), result
    assert running.wait() == 3
    one.daemon.stop()


def test_without_releases_there_is_nothing_to_go_back_to(operated: Operating) -> None:
    one = operated(command=MANY)
    for words, said in (
        (
            ("rollback",),
            "nothing to roll back: no reload can be called off, and there are no releases",
        ),
        (("deploy", "1"), "has no releases; start it with --releases DIR and --current PATH"),
        (("releases",), "there are no releases; start with --releases DIR and --current PATH"),
    ):
        ended = ctl(one, *words)
        assert ended.status == 2, ended
        assert said in ended.err
    one.daemon.stop()


# -- scripts -----------------------------------------------------------------------------------


def test_two_deploys_at_once(deploying: Deploying, releases: Releases) -> None:
    one, running, gate = deploying()

    for words in (("deploy", "3"), ("deploy", "3", "--dry-run"), ("deploy", "gated")):
        ended = ctl(one, *words)
        assert (ended.status, ended.err) == (
            6,
            "socketprotectorctl: a deploy of gated is in progress (generation 2); wait for its "
            f"end, or `socketprotectorctl --control {one.path} rollback`\n",
        )
    gate.stay_open()

    assert running.wait() == 0
    assert (serving(one), releases.named) == ("gated", "gated")
    one.daemon.stop()


@pytest.mark.costly
def test_expect_and_if_changed(web: Web, releases: Releases) -> None:
    one = web()
    wrong = ctl(one, "deploy", "2", "--expect", "3")
    assert (wrong.status, wrong.err) == (2, "socketprotectorctl: expected release 3, but found 1\n")
    deployed(one, "2", "--expect", "1")
    assert ctl(one, "rollback", "--expect", "1").status == 2

    same = ctl(one, "deploy", "2", "--if-changed")

    assert (same.status, same.out) == (0, "unchanged: release 2 is serving\n")
    assert one.status()["route"] == 2
    assert json.loads(ctl(one, "deploy", "2", "--if-changed", "--json").out)["result"] == (
        "unchanged"
    )
    deployed(one, "2")  # without the option it starts again
    assert one.status()["route"] == 3
    releases.add("1b", *MANY)
    (releases.folder / "2" / "daemon").write_text("#!/bin/sh\nexit 1\n")
    assert ctl(one, "deploy", "2", "--if-changed").status == 3
    one.daemon.stop()


def test_a_dry_run_moves_nothing(web: Web, releases: Releases) -> None:
    one = web()
    good, bad = ctl(one, "deploy", "2", "--dry-run"), ctl(one, "deploy", "bad", "--dry-run")

    assert (good.status, bad.status) == (0, 3)
    assert good.out == (
        "would deploy release 2: generation 2 became ready and was stopped; generation 1 is still "
        "serving\n"
    )
    assert "release bad is not ready to deploy: generation 3 failed" in bad.err
    assert (serving(one), releases.named) == ("1", "1")
    assert sorted(os.listdir(releases.live)) == ["current", "current.history", "current.lock"]
    found = json.loads(ctl(one, "releases", "--json").out)["releases"]
    assert [each["release"] for each in found] == ["1"]
    one.daemon.stop()


@pytest.mark.costly
def test_json_and_no_wait_and_timeout(web: Web, releases: Releases, tmp_path: Path) -> None:
    one = web()
    found = json.loads(ctl(one, "deploy", "2", "--json").out)
    assert (found["result"], found["release"], found["from_release"], found["generation"]) == (
        *("deployed", "2", "1", 2),
    )
    failed = json.loads(ctl(one, "deploy", "bad", "--json").out)
    assert (failed["result"], failed["last_words"]) == ("failed", "no such table")
    back = json.loads(ctl(one, "rollback", "--json").out)
    assert (back["result"], back["release"], back["from_release"]) == ("deployed", "1", "2")
    gate = Gate(tmp_path / "gate")
    releases.add("gated", *worker("ready_at_gate", gate.path))
    assert ctl(one, "deploy", "gated", "--timeout", "200ms").status == 4
    gate.stay_open()
    one.until("route", 5)
    assert ctl(one, "deploy", "3", "--no-wait").status == 0
    one.until("route", 6)
    assert (serving(one), releases.named) == ("3", "3")
    one.daemon.stop()


@pytest.mark.costly
def test_releases_lists_what_was_tried(web: Web, releases: Releases) -> None:
    one = web()
    deployed(one, "2")
    for name in ("bad", "open", "empty"):
        (releases.folder / name).mkdir(exist_ok=True)
        (releases.folder / name).chmod(0o777 if name == "open" else 0o755)
        assert ctl(one, "deploy", name).status == 3
    (releases.folder / "1" / "daemon").write_text("#!/bin/sh\n")
    (releases.folder / "2" / "__pycache__").mkdir()

    lines = ctl(one, "releases").out.splitlines()
    found = json.loads(ctl(one, "releases", "--json").out)["releases"]

    assert re.fullmatch(r"1  changed, succeeded \S+", lines[0]), lines
    assert re.fullmatch(r"2  serving, current, succeeded \S+", lines[1]), lines
    assert re.fullmatch(
        r"bad  failed \S+: \S+/bad/daemon exited with status 7 before it was ready", lines[2]
    ), lines
    # These two were never started.
    assert re.fullmatch(r"open  refused \S+: \S+/open .*: other users .*", lines[3]), lines
    assert re.fullmatch(r"empty  refused \S+: .*/empty/daemon.*", lines[4]), lines
    assert [(e["release"], e["serving"], e["current"], e["changed"]) for e in found[:3]] == [
        *(("1", False, False, True), ("2", True, True, False), ("bad", False, False, False)),
    ]
    times = [[each[f"{what}_at"] for what in ("served", "failed", "refused")] for each in found]
    assert [[time is not None for time in each] for each in times] == [
        *([True, False, False],) * 2,
        [False, True, False],
        *([False, False, True],) * 2,
    ]
    one.daemon.stop()


# -- other programs, and what comes after -----------------------------------------------------


@pytest.mark.costly
def test_an_upgrade_keeps_the_lock_the_release_and_the_history(
    web: Web, releases: Releases
) -> None:
    one = web()
    deployed(one, "2")

    assert "resumed" in upgrade(one.daemon)

    eventually(lambda: one.status()["restarts"] == 1, "the new program")
    assert one.status()["releases"]["owner"] is True
    assert (serving(one), releases.named) == ("2", "2")
    assert ctl(one, "rollback").status == 0
    assert serving(one) == "1"
    one.daemon.stop()


@pytest.mark.costly
def test_another_protector_follows_at_its_reload(
    web: Web, operated: Operating, releases: Releases, tmp_path: Path
) -> None:
    one = web()
    other = operated(
        "--control", tmp_path / "other", *releases.options, command=COMMAND, ready=False
    )
    other.path = tmp_path / "other"
    other.line()
    other.until("phase", "serving")
    assert other.status()["releases"]["owner"] is False
    refused = ctl(other, "deploy", "2")
    assert refused.status == 2, refused
    assert "another protector owns" in refused.err

    deployed(one, "2")
    assert serving(other) == "1"
    assert "current names 2, and 1 is serving" in other.status()["warnings"][0]
    assert ctl(other, "reload").status == 0

    assert serving(other) == "2"
    one.daemon.stop()
    deployed(other, "3")  # its owner has gone
    assert releases.named == "3"
    # The deploys of the owner before are in the history of the new owner.
    assert ctl(other, "rollback").status == 0
    assert (serving(other), releases.named) == ("2", "2")
    other.daemon.stop()


@pytest.mark.costly
def test_a_killed_ctl_changes_nothing(deploying: Deploying, releases: Releases) -> None:
    one, running, gate = deploying()

    running.process.kill()
    gate.stay_open()

    one.until("route", 2)
    eventually(lambda: releases.named == "gated", "current moved")
    one.daemon.stop()


@EITHER_HANDOFF
def test_after_a_power_cut_what_was_proved_starts(
    web: Web, operated: Operating, releases: Releases
) -> None:
    one = web()
    deployed(one, "2")
    assert ctl(one, "deploy", "bad").status == 3
    saved(one)
    pids = one.pids(2)
    for each in (one.daemon.pid, *pids):
        os.kill(each, signal.SIGKILL)
    one.daemon.process.wait()

    again = operated(*releases.options, command=COMMAND)

    assert serving(again) == "2"
    assert [e["release"] for e in again.line().ask("releases")["releases"]] == ["1", "bad", "2"]
    assert ctl(again, "rollback").status == 0  # the history outlived it
    assert serving(again) == "1"
    again.daemon.stop()


def test_a_killed_protector_goes_on_with_the_deploy(
    deploying: Deploying, releases: Releases
) -> None:
    one, running, gate = deploying("--guard")
    at_rest(one.daemon)  # the guard has what was made

    mark = kill_protector(one.daemon)
    revived(one.daemon, mark)
    gate.stay_open()

    assert running.wait() == 0, running.err.text()
    assert (serving(one), releases.named) == ("gated", "gated")
    assert not one.status()["reloads"][-1]["reason"]  # no operator has moved `current`
    assert one.status()["releases"]["owner"] is True
    one.daemon.stop()
