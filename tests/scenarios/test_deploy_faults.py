"""Deploys where `current` cannot be moved, and protectors killed at each write of a deploy."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.procfs import state_of
from tests.running import Protector, eventually
from tests.scenarios.adopting import at_rest, revived
from tests.scenarios.faults import Disk, injected
from tests.scenarios.managers import Service
from tests.scenarios.operating import Line, Operated, Operating
from tests.scenarios.releases import COMMAND, Releases, ctl, deployed, saved, serving, way
from tests.scenarios.running_ctl import Running
from tests.scenarios.users import A, B, Command
from tests.unit.ctl.conftest import run

Faulty = Callable[..., Operated]

#: In the resident process: a call fails, or kills it, while the flag is there.
FAULT = """
if resident():
    real = os.{call}
    def faulty(*words, **more):
        there = any(str(each).startswith({current!r}) for each in words)
        if not there or not os.path.exists({flag!r}):
            return real(*words, **more)
        {then}
    os.{call} = faulty
"""
FAIL = "raise fault({code!r})"
KILL = "os.unlink({flag!r}); os.kill(os.getpid(), 9)"
KILL_AFTER = "real(*words, **more); os.unlink({flag!r}); os.kill(os.getpid(), 9)"
#: The next writer of the history suspends itself first, and the resident process is killed.
LATE_WRITER = """
if resident():
    spawn = os.posix_spawn
    def late(path, words, *rest, **more):
        if not any("release_writer" in each for each in words) or not os.path.exists({flag!r}):
            return spawn(path, words, *rest, **more)
        os.unlink({flag!r})
        words = ("sh", "-c", 'echo $$ >"$0".pid; kill -STOP $$; exec "$@"', {flag!r}, *words)
        spawn("/bin/sh", words, *rest, **more)
        os.kill(os.getpid(), 9)
    os.posix_spawn = late
"""
#: The guard is the parent.
KILL_BOTH = "os.unlink({flag!r}); os.kill(os.getppid(), 9); os.kill(os.getpid(), 9)"
KILL_BOTH_AFTER = "real(*words, **more); " + KILL_BOTH


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(tmp_path / "srv")


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    """While it is there, the fault is."""
    return tmp_path / "flag"


@pytest.fixture
def faulty(
    operated: Operating,
    releases: Releases,
    flag: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Faulty:
    """Start a protector with a fault: faulty("rename", FAIL, *options, code="ENOSPC")."""

    def start(call: str, then: str, *options: str, code: str = "") -> Operated:
        then = then.format(code=code, flag=str(flag))
        text = FAULT.format(call=call, then=then, flag=str(flag), current=str(releases.current))
        for name, value in injected(tmp_path / "fault", text).items():
            monkeypatch.setenv(name, value)
        one = operated(*releases.options, *options, command=COMMAND)
        saved(one)
        return one

    return start


def left(releases: Releases) -> list[str]:
    return sorted(os.listdir(releases.live))


WHOLE = ["current", "current.history", "current.lock"]


def with_a_move_due(faulty: Faulty, flag: Path, *options: str) -> Operated:
    """Start, and deploy release 2, which serves while `current` cannot be moved to it."""
    one = faulty("rename", FAIL, *options, code="EROFS")
    flag.touch()
    assert ctl(one, "deploy", "2").status == 5
    return one


# -- failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EACCES"])
@pytest.mark.costly
def test_without_a_place_for_the_link_nothing_changes(
    faulty: Faulty, releases: Releases, flag: Path, code: str
) -> None:
    one = faulty("symlink", FAIL, code=code)
    flag.touch()

    ended = ctl(one, "deploy", "2")

    assert ended.status == 3, ended
    assert f"cannot make {releases.current}.next: " in ended.err
    assert (serving(one), releases.named, left(releases)) == ("1", "1", WHOLE)
    one.daemon.log.wait_for(r"event=reload-failed generation=2 ")
    assert not one.daemon.log.count("event=spawned generation=2")
    # That is no failure of the release.
    [known] = one.line().ask("releases")["releases"]
    assert known["release"] == "1"
    flag.unlink()
    deployed(one, "2")
    one.daemon.stop()


@pytest.mark.costly
def test_a_lock_that_cannot_be_opened_is_said_once(operated: Operating, releases: Releases) -> None:
    lock = releases.live / "current.lock"
    lock.mkdir()
    one = operated(*releases.options, command=COMMAND)

    ended = ctl(one, "deploy", "2")

    said = f"cannot lock {releases.current}: {lock}: Is a directory"
    assert (ended.status, ended.err) == (2, f"socketprotectorctl: {said}\n")
    assert said in one.status()["warnings"]
    one.status()
    assert one.daemon.log.count("event=current-not-locked") == 1
    lock.rmdir()
    deployed(one, "2")
    assert one.status()["warnings"] == []
    one.daemon.stop()


@pytest.mark.costly
def test_if_the_rename_fails_the_release_serves_and_it_is_tried_again(
    faulty: Faulty, releases: Releases, flag: Path
) -> None:
    one = faulty("rename", FAIL, code="ENOSPC")
    flag.touch()

    ended = ctl(one, "deploy", "2")

    said = f"{releases.current} still names 1: No space left on device"
    assert ended.status == 5, ended
    assert (
        f"release 2 is serving (before: 1), but {said}; SocketProtector tries again; see "
        f"`socketprotectorctl --control {one.path} status`" in (ended.err)
    )
    assert (serving(one), releases.named) == ("2", "1")
    status = one.status()
    assert status["releases"]["error"] == said
    assert said in status["warnings"]
    assert status["reloads"][-1]["reason"] == f"{said}; SocketProtector tries again"
    assert json.loads(ctl(one, "deploy", "2", "--json", "--force").out)["result"] == "not recorded"
    flag.unlink()
    eventually(lambda: releases.named == "2", "current moved")
    saved(one)
    one.daemon.log.wait_for(r"event=current-moved release=2\b")
    assert (one.status()["warnings"], left(releases)) == ([], WHOLE)
    one.daemon.stop()


@pytest.mark.costly
def test_a_stop_moves_current_first_and_says_so(
    faulty: Faulty, releases: Releases, flag: Path
) -> None:
    one = with_a_move_due(faulty, flag)
    flag.unlink()

    one.daemon.stop()

    assert (releases.named, left(releases)) == ("2", WHOLE)
    one.daemon.log.wait_for(r"event=current-moved release=2\b")


@pytest.mark.costly
def test_a_reload_does_not_go_back_to_what_current_still_names(
    faulty: Faulty, releases: Releases, flag: Path
) -> None:
    one = with_a_move_due(faulty, flag)

    assert ctl(one, "reload").status == 0

    assert (serving(one), releases.named) == ("2", "1")
    flag.unlink()
    eventually(lambda: releases.named == "2", "current moved")
    one.daemon.stop()


@pytest.mark.costly
def test_a_link_that_an_operator_moves_meanwhile_stays(
    faulty: Faulty, releases: Releases, flag: Path
) -> None:
    one = with_a_move_due(faulty, flag)

    assert ctl(one, "diff").out.startswith("no configuration change ")

    releases.point_at("3")
    flag.unlink()

    assert ctl(one, "diff").out.startswith("release: 2 -> 3\n")
    assert ctl(one, "reload").status == 0
    assert (serving(one), releases.named, one.status()["warnings"]) == ("3", "3", [])
    saved(one)
    assert way(releases) == ["1", "2", "3"]
    one.daemon.stop()


@pytest.mark.costly
def test_another_program_tries_again_what_failed(
    faulty: Faulty, releases: Releases, flag: Path
) -> None:
    one = with_a_move_due(faulty, flag, "--guard")
    mark = len(one.daemon.log.seen)
    os.kill(one.status()["pid"], 9)
    revived(one.daemon, mark)
    assert one.until("restarts", 1)["releases"]["error"]

    flag.unlink()

    eventually(lambda: releases.named == "2", "current moved")
    assert serving(one) == "2"
    one.daemon.stop()


@pytest.mark.parametrize(("state", "status"), [("full", 5), ("write-protected", 3)])
def test_a_disk_without_room_for_current(
    on_disk: Callable[..., Protector],
    new_disk: Callable[[str], Disk],
    releases: Releases,
    place: Path,
    state: str,
    status: int,
) -> None:
    disk = new_disk("32k")
    disk.seen.chmod(0o755)
    releases.live, releases.current = disk.seen, disk.seen / "current"
    releases.point_at("1")
    options = ("--releases", releases.folder, "--current", disk.path / "current")
    daemon = on_disk(disk, "--control", place, *options, "127.0.0.1:0", "--", *COMMAND)
    one = Operated(daemon, place)
    one.line()
    one.until("phase", "serving")
    saved(one)
    disk.fill() if state == "full" else disk.cover()

    ended = ctl(one, "deploy", "2")

    assert ended.status == status, ended
    if state == "full":  # a link needs no room, but its history does
        assert "may not be on disk: current.history: No space left on device;" in ended.err
        assert (serving(one), releases.named) == ("2", "2")
        disk.make_room()
        saved(one)
        daemon.log.wait_for("event=history-written")
        assert way(releases) == ["1", "2"]
    else:
        assert f"cannot make {disk.path}/current.next: Read-only file system" in ended.err
        assert (serving(one), releases.named) == ("1", "1")
    one.end()
    daemon.stop()


@pytest.mark.costly
def test_an_unreadable_history_is_empty_and_said_and_kept(
    operated: Operating, releases: Releases
) -> None:
    history = releases.live / "current.history"
    texts = ("{", "", '{"format": 9}', "x" * 2_000_000)
    names = [f"{history}.unreadable{end}" for end in ("", ".2", ".3", ".4")]
    for text, name in zip(texts, names, strict=True):
        history.write_text(text)
        one = operated(*releases.options, command=COMMAND)
        one.daemon.log.wait_for(
            r"event=history-unreadable file=\S+/current.history error=.* "
            r'hint="the history of releases begins again; '
            rf'the next write renames the old file to {name}"'
        )
        saved(one)
        found = one.line().ask("releases")["releases"]
        assert [each["release"] for each in found] == ["1"]
        assert json.loads(history.read_text())["way"] == ["1"]
        one.daemon.stop()
    assert [Path(name).read_text() for name in names] == [*texts]


@pytest.mark.parametrize("then", [KILL, KILL_AFTER], ids=["before", "after"])
@pytest.mark.costly
def test_a_protector_killed_while_it_keeps_an_unreadable_history_loses_none(
    faulty: Faulty, operated: Operating, releases: Releases, flag: Path, then: str
) -> None:
    history = releases.live / "current.history"
    kept = releases.live / "current.history.unreadable"
    faulty("rename", then).daemon.stop()
    kept.write_text("an earlier one")
    history.write_text('{"format": 9}')
    flag.touch()

    killed = operated(*releases.options, command=COMMAND, ready=False)
    killed.daemon.process.wait()

    assert not flag.exists()
    killed.daemon.log.wait_for("event=history-unreadable ")
    again = operated(*releases.options, command=COMMAND)
    saved(again)
    assert kept.read_text() == "an earlier one"
    assert Path(f"{kept}.2").read_text() == '{"format": 9}'
    assert left(releases) == sorted([*WHOLE, kept.name, f"{kept.name}.2"])
    assert way(releases) == ["1"]
    again.daemon.stop()


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.costly
def test_what_is_no_link_at_current_is_not_replaced(
    operated: Operating, releases: Releases, kind: str
) -> None:
    one = operated(*releases.options, command=COMMAND)
    saved(one)
    releases.current.unlink()
    releases.current.mkdir() if kind == "folder" else releases.current.write_text("mine")
    was = os.lstat(releases.current)

    for words in (("deploy", "2"), ("deploy", "2", "--force"), ("rollback",)):
        ended = ctl(one, *words)
        said = f"{releases.current} is no symbolic link, and is not replaced; move it away"
        assert (ended.status, ended.err) == (2, f"socketprotectorctl: {said}\n"), words

    assert (os.lstat(releases.current), serving(one), left(releases)) == (was, "1", WHOLE)
    releases.current.rename(releases.live.parent / "away")
    deployed(one, "2", "--force")
    assert releases.named == "2"
    one.daemon.stop()


def not_recorded(one: Operated, meanwhile: Callable[[], object]) -> str:
    """Deploy release 2, do something before it is proved; return what the command says."""
    running = Running("--control", str(one.path), "deploy", "2")
    try:
        one.until("route", 2)
        meanwhile()
        assert ctl(one, "promote").status == 0
        assert running.wait() == 5
        return running.err.text()
    finally:
        running.end()


@pytest.mark.costly
def test_what_comes_to_current_during_a_deploy_is_not_replaced(
    operated: Operating, releases: Releases
) -> None:
    one = operated(*releases.options, "--settle", "1h", command=COMMAND)
    saved(one)

    def replaced() -> None:
        releases.current.unlink()
        releases.current.write_text("mine")

    said = not_recorded(one, replaced)

    assert f"{releases.current} still names no release: {releases.current} is no symbolic" in said
    assert (serving(one), releases.current.read_text()) == ("2", "mine")
    releases.current.unlink()
    eventually(lambda: os.path.islink(releases.current) and releases.named == "2", "current moved")
    saved(one)
    assert left(releases) == WHOLE
    one.daemon.stop()


@pytest.mark.costly
def test_current_does_not_move_to_a_release_whose_folder_is_gone(
    operated: Operating, releases: Releases
) -> None:
    one = operated(*releases.options, "--settle", "1h", command=COMMAND)
    saved(one)
    folder, away = releases.folder / "2", releases.folder.parent / "away"

    said = not_recorded(one, lambda: folder.rename(away))

    assert f"{releases.current} still names 1: {folder} is gone; SocketProtector tries" in said
    assert (serving(one), releases.named) == ("2", "1")
    away.rename(folder)
    eventually(lambda: releases.named == "2", "current moved")
    saved(one)
    assert (one.status()["warnings"], left(releases)) == ([], WHOLE)
    one.daemon.stop()


@pytest.mark.parametrize("target", ["../releases/gone", "/etc", "current", "."])
@pytest.mark.costly
def test_a_link_that_leads_nowhere_needs_force(
    operated: Operating, releases: Releases, target: str
) -> None:
    one = operated(*releases.options, command=COMMAND)
    saved(one)
    releases.current.unlink()
    releases.current.symlink_to(target)

    ended = ctl(one, "deploy", "2")

    what = "names gone" if target.endswith("gone") else "leads to no release"
    assert ended.status == 2, ended
    assert (
        f"/current {what}, but 1 is serving; see "
        f"`socketprotectorctl --control {one.path} releases`, and use --force" in ended.err
    )
    assert os.readlink(releases.current) == target
    deployed(one, "2", "--force")
    assert (serving(one), releases.named, left(releases)) == ("2", "2", WHOLE)
    one.daemon.stop()


@pytest.mark.costly
def test_a_serving_release_that_loses_its_folder_is_warned_of(
    operated: Operating, releases: Releases
) -> None:
    one = operated(*releases.options, command=COMMAND)
    saved(one)
    folder, away = releases.folder / "1", releases.folder.parent / "away"
    folder.rename(away)

    said = "current names 1, which has no folder, so a restart would fail"
    assert one.status()["warnings"] == [said]
    away.rename(folder)
    assert one.status()["warnings"] == []
    one.daemon.stop()


# -- kills ----------------------------------------------------------------------------------------


@pytest.mark.costly
def test_the_late_writer_of_a_killed_protector_replaces_no_newer_history(
    operated: Operating,
    releases: Releases,
    flag: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = LATE_WRITER.format(flag=str(flag))
    for name, value in injected(tmp_path / "fault", text).items():
        monkeypatch.setenv(name, value)
    one = operated("--guard", *releases.options, command=COMMAND)
    saved(one)
    at_rest(one.daemon)
    flag.touch()
    assert ctl(one, "deploy", "2").status == 0
    writer = int(flag.with_suffix(".pid").read_text())
    eventually(lambda: state_of(writer) == "T", "the suspended writer")
    deployed(one, "3")
    saved(one)
    assert way(releases) == ["1", "2", "3"]

    os.kill(writer, signal.SIGCONT)

    eventually(lambda: state_of(writer) in ("", "Z"), "the writer's end")
    assert (way(releases), left(releases)) == (["1", "2", "3"], WHOLE)
    one.daemon.stop()


@pytest.mark.parametrize("then", [KILL, KILL_AFTER], ids=["before", "after"])
@pytest.mark.parametrize("call", ["symlink", "rename"])
@pytest.mark.costly
def test_a_protector_killed_at_a_write_goes_on_with_the_deploy(
    faulty: Faulty, releases: Releases, flag: Path, call: str, then: str
) -> None:
    one = faulty(call, then, "--guard")
    flag.touch()

    ended = ctl(one, "deploy", "2")

    assert not flag.exists()
    assert ended.status == 0, ended
    one.until("restarts", 1)
    saved(one)
    assert (serving(one), releases.named, left(releases)) == ("2", "2", WHOLE)
    assert way(releases) == ["1", "2"]
    one.daemon.stop()


@pytest.mark.parametrize(
    ("options", "then", "after"),
    [
        ((), KILL, False),
        ((), KILL_AFTER, True),
        (("--guard",), KILL_BOTH, False),
        (("--guard",), KILL_BOTH_AFTER, True),
    ],
    ids=["before", "after", "guard-before", "guard-after"],
)
@pytest.mark.parametrize("call", ["symlink", "rename"])
@pytest.mark.costly
def test_guard_and_protector_killed_at_a_write_leave_the_old_or_the_new_release(
    faulty: Faulty,
    operated: Operating,
    releases: Releases,
    flag: Path,
    call: str,
    options: tuple[str, ...],
    then: str,
    after: bool,
) -> None:
    one = faulty(call, then, *options)
    flag.touch()
    running = Running("--control", str(one.path), "deploy", "2")
    try:
        one.daemon.process.wait()
        assert running.wait() == 1
    finally:
        running.end()

    moved = call == "rename" and after
    assert releases.named == ("2" if moved else "1")
    again = operated(*releases.options, command=COMMAND)
    assert serving(again) == releases.named
    deployed(again, "3")
    saved(again)
    assert left(releases) == WHOLE
    again.daemon.stop()


# -- other users ---------------------------------------------------------------------------------


@needs.ANOTHER_USER
@pytest.mark.parametrize("words", [("--user", A), ("--user", A, "--worker-user", B)])
@pytest.mark.costly
def test_another_user_moves_current_in_a_folder_of_its_own(
    command: Command, words: tuple[str, ...]
) -> None:
    releases = Releases(command.start.folder / "srv")
    for each in ("1", "2"):
        releases.add(each, *command.worker("many"))
    for folder, _, _ in os.walk(releases.folder.parent):
        os.chmod(folder, 0o755)
    shutil.chown(releases.live, A)
    where = command.start.folder / "control"

    command.up(*words, "--control", where, *releases.options, "127.0.0.1:0", "--", *COMMAND)
    deployed_at(where, "2")

    assert releases.named == "2"
    assert os.lstat(releases.current).st_uid == pwd.getpwnam(A).pw_uid
    shutil.chown(releases.folder / "1", A)
    ended = run("--control", str(where), "rollback")
    if "--worker-user" in words:
        assert ended.status == 0, ended
    else:  # the workers run as that user, so it may not make a release
        assert ended.status == 3, ended
        assert "belongs to uid" in ended.err
    command.start.stop()


def deployed_at(control: Path, name: str) -> None:
    ended = run("--control", str(control), "deploy", name)
    assert ended.status == 0, ended


@pytest.mark.costly
def test_a_service_manager_keeps_the_lock_over_a_kill_and_not_over_a_stop(
    service: Service, releases: Releases, tmp_path: Path
) -> None:
    control = tmp_path / "control"
    options: tuple[str | Path, ...] = ("--control", control, *releases.options)
    words = (*options, "127.0.0.1:0", "--", *COMMAND)

    def takes(name: str) -> None:
        deployed_at(control, name)
        with Line(control) as line:
            found = line.status()["releases"]
        assert (found["owner"], found["serving"], releases.named) == (True, name, name)

    first = service.start(*words).ready()
    takes("2")
    at_rest(first)
    service.kill()
    second = service.start(*words)
    second.log.wait_for("event=resumed")
    takes("3")
    second.stop()
    third = service.start(*words).ready()
    takes("1")
    third.stop()
