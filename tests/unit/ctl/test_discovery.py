"""Which protector is meant."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from socketprotector.ctl import discovery
from socketprotector.ctl.client import Client
from socketprotector.ctl.query_all import SocketAnswer, query_all
from socketprotector.system import control_path
from tests.running import DEADLINE_S, Ended
from tests.unit.ctl.fake import MALFORMED, Fake, Message, Refusing, listener, malformed

Ctl = Callable[..., Ended]
Fakes = Callable[[str], Fake]


def dead(path: Path) -> None:
    """A socket file without a listener."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def level(ctl: Ctl, *arguments: str) -> Ended:
    return ctl(*arguments, "status", "--json")


def test_the_only_one_that_lives_is_taken(fake: Fake, folder: Path, ctl: Ctl) -> None:
    dead(folder / "old.control")

    assert level(ctl).status == 0
    assert fake.commands() == ["status"]


def test_none_is_status_1_and_several_are_status_2(fakes: Fakes, ctl: Ctl) -> None:
    none = level(ctl)
    fakes("web"), fakes("api")
    several = level(ctl)

    assert none.status == 1
    assert "no protector has a control socket in " in none.err
    assert several.status == 2
    assert several.err.endswith("choose one by --name NAME: api, web\n")


@pytest.mark.parametrize("words", [("status",), ("--name", "web", "status"), ("list",)])
def test_without_xdg_runtime_dir_a_user_is_told_how_to_find_the_socket(
    folder: Path, ctl: Ctl, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    advice = "set it to the protector's value, or pass the protector's --control PATH\n"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    found = ctl(*words)
    assert (found.out + found.err).endswith(f"; XDG_RUNTIME_DIR is not set: {advice}")

    monkeypatch.setattr("os.geteuid", lambda: 0)
    found = ctl(*words)
    assert "XDG_RUNTIME_DIR" not in found.out + found.err


@pytest.mark.parametrize("option", ["--control", "--pid-file", "--name"])
@pytest.mark.parametrize("kind", ["none", "file", "folder", "socket"])
def test_a_path_with_a_line_break_is_shown_in_one_line(
    folder: Path, ctl: Ctl, option: str, kind: str
) -> None:
    path = folder / "a\nb"
    if kind == "file":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        dead(path)

    ended = level(ctl, option, str(path))

    assert ended.status in (1, 2)
    [line] = ended.err.splitlines()
    assert f"{folder}/a\\nb: " in line


def test_a_folder_with_a_line_break_is_shown_in_one_line(
    folder: Path, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"{folder}/a\nb")

    [line] = level(ctl).err.splitlines()

    assert f"{folder}/a\\nb/socketprotector" in line


def test_by_name_in_either_folder_the_living_one_first(
    fakes: Fakes, folder: Path, ctl: Ctl
) -> None:
    dead(folder / "web.control")
    system = Path(control_path.SYSTEM)
    living = Fake(system / "web.control")
    try:
        assert level(ctl, "--name", "web").status == 0
    finally:
        living.end()

    assert level(ctl, "--name", "web").status == 1
    missing = level(ctl, "--name", "wbe")
    assert missing.status == 1
    assert "--name wbe: no protector of that name in " in missing.err
    slash = level(ctl, "--name", "../x")
    assert "--name ../x: no protector of that name in " in slash.err


def listening(port: int) -> list[Message]:
    return [listener(f"tcp:0.0.0.0:{port}")]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no busy machine decide: an instance that has not answered in time has no known name."""
    monkeypatch.setattr(query_all, "__defaults__", (DEADLINE_S,))


@pytest.mark.usefixtures("patient")
def test_two_of_a_name_are_told_apart_by_their_listeners(fakes: Fakes, ctl: Ctl) -> None:
    first, second, other = fakes("web"), fakes("web:81"), fakes("api")
    first.status.update(name="web", listeners=listening(80))
    second.status.update(name="web", listeners=listening(81))

    several = level(ctl, "--name", "web")
    assert several.status == 2
    assert (
        several.err
        == "socketprotectorctl: --name web: several match; choose one of web:80, web:81\n"
    )
    for each in (first, second, other):
        each.asked.clear()
    assert level(ctl, "--name", "web:80").status == 0
    assert (len(first.commands()), len(second.commands())) == (2, 1), "one question to know it"
    assert level(ctl, "--name", "api").status == 0
    other.status.update(name="api", listeners=listening(81))
    assert level(ctl, "--name", "80").status == 0
    assert "several match; choose one of api, web:81" in level(ctl, "--name", "81").err
    names = [line.split()[0] for line in ctl("list").out.splitlines()[1:]]
    assert names == ["api", "web:80", "web:81"]


@pytest.mark.usefixtures("patient")
def test_a_changed_first_listener_changes_the_name(fakes: Fakes, ctl: Ctl) -> None:
    """A key keeps the port of the start; the name has the port of the last reload."""
    for key, port in (("web", 80), ("web:81", 82), ("web:0.0.0.0:81", 81)):
        fakes(key).status.update(name="web", listeners=listening(port))

    for port in (80, 81, 82):
        found = json.loads(level(ctl, "--name", f"web:{port}").out)
        assert found["listeners"] == listening(port)


@pytest.mark.usefixtures("patient")
def test_a_key_that_is_the_name_of_a_second_protector_too(fakes: Fakes, ctl: Ctl) -> None:
    for key, address in (("web", "10.0.0.1"), ("web:80", "10.0.0.2")):
        fakes(key).status.update(name="web", listeners=[listener(f"tcp:{address}:80")])

    several = level(ctl, "--name", "web:80")

    assert several.status == 2
    assert several.err.endswith("several match; choose one of web:10.0.0.1:80, web:10.0.0.2:80\n")


@pytest.fixture
def claimant(folder: Path) -> Iterator[tuple[Fake, Fake]]:
    """Two instances with folders of their own: the first can claim to be the second."""
    evil, web = Fake(folder / "evil" / "control"), Fake(folder / "web" / "control")
    for each in (evil, web):
        each.status["listeners"] = listening(80)
    yield evil, web
    evil.end()
    web.end()


@pytest.mark.parametrize("claimed", ["web", "web:80"])
def test_the_name_of_its_own_folder_is_an_instances_whatever_another_one_says(
    claimant: tuple[Fake, Fake], ctl: Ctl, claimed: str
) -> None:
    evil, web = claimant
    evil.status["name"] = claimed

    found = json.loads(ctl("list", "--json").out)["instances"]

    assert [each["name"] for each in found if each["control"] == str(web.path)] == ["web"]
    evil.asked.clear()
    assert level(ctl, "--name", "web").status == 0
    assert evil.commands() == []


@pytest.mark.parametrize("said", ["pid", "main_pid"])
def test_the_socket_beside_the_pid_file_is_meant_whatever_another_one_says(
    claimant: tuple[Fake, Fake], ctl: Ctl, said: str
) -> None:
    evil, web = claimant
    pid = os.getppid()  # neither is that process: as under a guard that has restarted it
    evil.status[said] = web.status["main_pid"] = pid
    file = web.path.with_name("pid")
    file.write_text(f"{pid}\n")
    evil.status["name"] = "mine"

    assert json.loads(level(ctl, "--pid-file", str(file)).out)["name"] == "web"


def test_two_at_files_of_one_name_are_told_apart_by_the_whole_path(fakes: Fakes, ctl: Ctl) -> None:
    for key, path in (("web", "/run/a/s"), ("web:s", "/run/b/s"), ("old", "/run/c/t")):
        fakes(key).status.update(name="web", listeners=[listener(f"unix:{path}")])

    said = level(ctl, "--name", "web").err
    assert said.endswith("several match; choose one of web:t, web:/run/a/s, web:/run/b/s\n")
    names = [line.split()[0] for line in ctl("list").out.splitlines()[1:]]
    assert sorted(names) == ["web:/run/a/s", "web:/run/b/s", "web:t"]
    for name in names:
        assert level(ctl, "--name", name).status == 0


def test_the_name_is_what_the_protector_says_whatever_its_socket_is_called(
    fakes: Fakes, ctl: Ctl
) -> None:
    """As those of older programs, which went by the port."""
    fakes("8000").status.update(name="gunicorn")
    fakes("web")

    for name in ("gunicorn", "8000", "gunicorn:4321"):
        assert json.loads(ctl("--name", name, "status", "--json").out)["name"] == "gunicorn", name
    listed = json.loads(ctl("list", "--json").out)["instances"]
    assert [(each["name"], each["key"]) for each in listed] == [
        ("gunicorn", "8000"),
        ("web", "web"),
    ]


def test_a_name_that_several_have_is_not_offered_for_the_one_in_its_own_folder(
    fakes: Fakes, folder: Path, ctl: Ctl
) -> None:
    second = fakes("web:81")
    second.status.update(name="web", listeners=listening(81))
    (folder / "web").mkdir()
    first = Fake(folder / "web" / "control")
    try:
        said = level(ctl, "--name", "web")
    finally:
        first.end()

    assert said.status == 2
    for path in (second.path, folder / "web" / "control"):
        assert f"--control {path}" in said.err


def test_two_of_one_name_and_port_are_told_apart_by_their_sockets(
    fakes: Fakes, folder: Path, ctl: Ctl
) -> None:
    fakes("web")
    other = Fake(Path(control_path.SYSTEM) / "web.control")
    try:
        said = level(ctl, "--name", "web")
    finally:
        other.end()

    assert said.status == 2
    assert (
        f"several match; choose one of --control {folder / 'web.control'}, --control " in said.err
    )


def test_by_path_however_long(tmp_path: Path, folder: Path, ctl: Ctl) -> None:
    short = Fake(tmp_path / "s")
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    os.rename(tmp_path / "s", deep / "s")
    try:
        assert level(ctl, "--control", str(deep / "s")).status == 0
    finally:
        short.end()

    gone = level(ctl, "--control", str(tmp_path / "none"))
    assert (gone.status, gone.err) == (
        1,
        f"socketprotectorctl: {tmp_path}/none: no such socket; the protector is not running, "
        "or has --no-control; `socketprotectorctl list` shows running protectors\n",
    )


def test_a_control_path_of_another_kind_of_file_is_refused(tmp_path: Path, ctl: Ctl) -> None:
    (tmp_path / "file").touch()

    for path in (tmp_path / "file", tmp_path, Path("/dev/null")):
        said = level(ctl, "--control", str(path))
        assert said.status == 2
        assert f"--control {path}: not a socket; `socketprotectorctl list` shows " in said.err


def test_a_control_path_that_leads_nowhere_is_called_so(
    tmp_path: Path, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one, as of a variable that is not set, is not the current folder."""
    empty = level(ctl, "--control", "")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    relative = level(ctl, "--control", "web.control")

    assert (empty.status, empty.err) == (2, "socketprotectorctl: --control: the path is empty\n")
    assert relative.status == 1
    assert relative.err.startswith("socketprotectorctl: web.control: no such socket; ")


def test_by_pid_file(fakes: Fakes, tmp_path: Path, ctl: Ctl) -> None:
    # SO_PEERCRED of all fakes is this process; so the pid of another shows that it is status's.
    web, api = fakes("web"), fakes("api")
    web.status["pid"], api.status["pid"] = 1, os.getppid()
    pid_file = tmp_path / "pid"
    pid_file.write_text(f"{os.getppid()}\n")

    assert level(ctl, "--pid-file", str(pid_file)).status == 0
    assert len(api.commands()) == 2
    api.status.update(pid=1, main_pid=os.getppid())  # the guard's stands in the file
    assert level(ctl, "--pid-file", str(pid_file)).status == 0
    assert len(api.commands()) == 4
    pid_file.write_text(f"{os.getpid()}\n")
    assert level(ctl, "--pid-file", str(pid_file)).status == 0


@pytest.mark.parametrize("before", [None, "999999999"], ids=["absent", "old"])
def test_a_pid_file_is_awaited_that_a_restart_has_not_written_yet(
    before: str | None, fakes: Fakes, tmp_path: Path, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes("web")
    file = tmp_path / "pid"
    if before is not None:
        file.write_text(before)

    def restarts(_: float) -> None:
        file.write_text(f"{os.getpid()}\n")

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=restarts)
    monkeypatch.setattr(discovery, "time", clock)

    assert level(ctl, "--pid-file", str(file)).status == 0


@pytest.mark.parametrize("option", ["--name", "--pid-file"])
def test_an_instance_that_answers_late_is_found(
    option: str, fakes: Fakes, tmp_path: Path, ctl: Ctl
) -> None:
    web, asked = fakes("web"), list[object]()
    web.status.update(listeners=listening(4321), pid=os.getppid())
    (tmp_path / "pid").write_text(f"{os.getppid()}\n")

    def second(*_: object) -> Message | None:
        asked.append(None)
        return web.status if len(asked) > 1 else None

    web.answers["status"] = second

    value = {"--name": "4321", "--pid-file": str(tmp_path / "pid")}[option]
    assert level(ctl, option, value).status == 0
    assert len(asked) == 3  # twice to find it, and once for the answer


def test_many_names_cost_one_query_of_all_and_no_wait_for_a_silent_one(
    fakes: Fakes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes("web")
    released = threading.Event()
    fakes("shop").status["name"] = "market"
    fakes("silent").answers["status"] = lambda *_: {} if released.wait(DEADLINE_S) else None
    dead(folder / "dead.control")
    queries: list[int] = []

    def queried(paths: Iterable[str], within_s: float = 0.1) -> list[SocketAnswer]:
        queries.append(len(found := [*paths]))
        return query_all(found, within_s)

    monkeypatch.setattr(discovery, "query_all", queried)
    found = discovery.paths_by_name(["web", "market", "missing", "dead", "silent"])
    released.set()

    paths = [str(folder / f"{name}.control") for name in ("web", "shop", "dead", "silent")]
    assert found == [*paths[:2], "", *paths[2:]]
    assert queries == [4]
    assert discovery.paths_by_name(["web", "silent"]) == [paths[0], paths[3]]
    assert queries == [4], "a name that only one socket has needs no query"


def test_an_instance_that_never_answers_is_named(
    fakes: Fakes, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "ANSWER_S", 0.2)
    fakes("web").answers["status"] = lambda *_: None

    said = level(ctl, "--name", "4321")

    assert said.status == 1
    assert "none of the protectors that answered has this name; no answer from /" in said.err
    assert "web.control; try again, or pass --control PATH" in said.err


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_pid_file_that_is_no_file_is_refused_at_once(
    kind: str, fake: Fake, tmp_path: Path, ctl: Ctl
) -> None:
    path = tmp_path / "pid"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")

    said = level(ctl, "--pid-file", str(path))

    assert said.status == 2
    assert f"--pid-file {path}: not a regular file" in said.err


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (None, 1, "no such file; start the protector, or check the path"),
        ("junk", 2, "it contains no pid"),
        ("999999999", 1, "process 999999999 is gone"),
        ("1", 1, "no control socket of process 1 in "),
    ],
)
def test_a_pid_file_that_leads_nowhere_is_reported(
    content: str | None,
    status: int,
    words: str,
    fake: Fake,
    tmp_path: Path,
    ctl: Ctl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery, "_RESTART_S", 0.1)
    if content is not None:
        (tmp_path / "pid").write_text(content)

    said = level(ctl, "--pid-file", str(tmp_path / "pid"))

    assert said.status == status
    assert words in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(("whose", "status"), [("another's", 100), ("ours", 1)])
def test_a_pid_file_of_another_users_protector_says_that_permission_is_missing(
    whose: str,
    status: int,
    fakes: Fakes,
    tmp_path: Path,
    ctl: Ctl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A protector of our own would let us in, so another protector does not matter."""
    uid = os.stat("/proc/1").st_uid

    def no(*_: object) -> None:
        raise Refusing("denied", "permission denied")

    secret = fakes("secret")
    secret.answers["status"] = no
    (tmp_path / "pid").write_text("1")

    monkeypatch.setattr(os, "geteuid", lambda: uid + (whose != "ours"))

    said = level(ctl, "--pid-file", str(tmp_path / "pid"))

    assert said.status == status
    assert f" (no permission for {secret.path}); pass --control PATH\n" in said.err


def test_only_one_way_at_a_time(ctl: Ctl) -> None:
    said = level(ctl, "--name", "a", "--control", "b")

    assert said.status == 2
    assert said.err == "socketprotectorctl: --name and --control: give only one of them\n"


def test_the_protector_may_be_named_after_the_command(fakes: Fakes, ctl: Ctl) -> None:
    web, other = fakes("web"), fakes("other")

    assert ctl("status", "--name", "web", "--json").status == 0
    assert (len(web.commands()), other.commands()) == (1, [])
    both = ctl("--name", "web", "status", "--pid-file", "x")
    assert both.status == 2
    assert both.err == "socketprotectorctl: --name and --pid-file: give only one of them\n"


def test_list_shows_the_living_the_dead_the_denied_and_the_silent(
    fakes: Fakes, folder: Path, ctl: Ctl
) -> None:
    fakes("web")

    def no(*_: object) -> None:
        raise Refusing("denied", "permission denied")

    fakes("secret").answers["status"] = no
    fakes("slow").answers["status"] = lambda *_: None
    dead(folder / "old.control")

    said = ctl("list")

    assert said.status == 0
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0][:3] == ["NAME", "PHASE", "PID"]
    assert [line[:2] for line in lines[1:]] == [
        ["old", "dead"],
        ["secret", "denied"],
        ["slow", "silent"],
        ["web", "serving"],
    ]
    listed = json.loads(ctl("list", "--living", "--json").out)["instances"]
    assert [each["key"] for each in listed] == ["secret", "slow", "web"]
    assert listed[2]["status"]["pid"] == os.getpid()


@pytest.mark.parametrize("result", MALFORMED, ids=["brackets", "surrogate", "numbers"])
def test_list_shows_the_others_beside_a_malformed_status(
    fakes: Fakes, ctl: Ctl, result: bytes
) -> None:
    fakes("good")
    malformed(fakes("bad"), result)

    said = ctl("list")

    assert (said.status, said.err) == (0, "")
    lines = said.out.splitlines()
    assert [line for line in lines if line.startswith("good") and " serving " in line]
    assert len(lines) == 3


def test_list_of_none(folder: Path, ctl: Ctl) -> None:
    assert ctl("list").out.startswith("no protector has a control socket in ")
    assert ctl("--name", "x", "list").status == 2


def test_the_client_knows_which_process_listens(fake: Fake) -> None:
    with Client(str(fake.path)) as client:
        assert client.peer[0] == os.getpid()
