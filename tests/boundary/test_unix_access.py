"""Who can connect to a UNIX socket, by what the files and folders of this machine say."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from socketprotector.daemon.control.status import of_warnings
from socketprotector.launch import unix_access
from socketprotector.launch.bind import bind_all, discard_all
from socketprotector.launch.listen_spec import parse
from socketprotector.model.settings import ListenerSettings, Settings
from tests import needs
from tests.own_folder import let_through
from tests.together import together

needs_root = needs.ROOT
#: A group that no file here has by itself.
OTHER = 12345


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that every user can enter."""
    made = tmp_path / "f"
    made.mkdir()
    made.chmod(0o755)
    let_through(tmp_path)
    return made


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def said_by_check(folder: Path, query: str) -> list[str]:
    """Return what --check would say of a socket that is not bound."""
    text = f"unix:{folder}/s{query}"
    return [
        *unix_access.notices([parse(text, "/")], [ListenerSettings(f"unix:{folder}/s", text=text)])
    ]


def said_at_start(folder: Path, query: str) -> list[str]:
    """Return what a start says, with the socket bound."""
    listens = [parse(f"unix:{folder}/s{query}", "/")]
    bound = bind_all(listens, 16, notice=lambda text: None)
    try:
        return [*unix_access.notices(listens, [each.settings for each in bound])]
    finally:
        discard_all(bound)


@together(
    ("query", "who", "rights", "better"),
    [
        ("", "user {user} can", "srwxr-xr-x", "?mode=0660&group=GROUP"),
        ("?backlog=7", "user {user} can", "srwxr-xr-x", "?mode=0660&group=GROUP&backlog=7"),
        ("?mode=0755", "user {user} can", "srwxr-xr-x", "?mode=0660&group=GROUP"),
        ("?group={gid}", "user {user} can", "srwxr-xr-x", "?mode=0660&group={gid}"),
    ],
)
def test_a_socket_that_only_its_owner_can_use_is_named_with_the_argument_that_helps(
    folder: Path, query: str, who: str, rights: str, better: str
) -> None:
    names = {"gid": os.getegid(), "user": unix_access._user(os.geteuid())}

    said = said_at_start(folder, query.format(**names))

    assert said == said_by_check(folder, query.format(**names))
    [line] = said
    assert line.startswith(f"unix:{folder}/s: only {who.format(**names)} connect ({rights} ")
    assert f"'unix:{folder}/s{better.format(**names)}'" in line


def test_a_warning_ends_when_the_operator_changes_what_it_names(folder: Path) -> None:
    """By chmod, of the socket file or of the folder that is closed."""
    listens = [parse(f"unix:{folder}/{name}", "/") for name in ("s", "closed/s?mode=0666")]
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    bound = bind_all(listens, 16, notice=lambda text: None)
    try:
        settings = Settings("x", ("x",), "/")
        warnings = (*unix_access.notices(listens, [each.settings for each in bound]), "another")
        settings = replace(settings, warnings=warnings)
        assert len(warnings) == 3
        assert of_warnings(settings, ()) == [*warnings]

        (folder / "s").chmod(0o666)
        assert of_warnings(settings, ()) == [*warnings[1:]]
        closed.chmod(0o755)
        assert of_warnings(settings, ()) == ["another"]
    finally:
        discard_all(bound)


@together("query", ["?mode=0666", "?mode=0600", "?mode=0660&group={gid}", "?user={uid}"])
def test_nothing_is_said_of_access_that_the_operator_chose(folder: Path, query: str) -> None:
    chosen = query.format(gid=os.getegid(), uid=os.geteuid())

    assert said_at_start(folder, chosen) == said_by_check(folder, chosen) == []


def test_nothing_is_said_where_the_umask_lets_every_user_connect(folder: Path) -> None:
    os.umask(0)

    assert said_at_start(folder, "") == said_by_check(folder, "") == []


def test_a_mode_for_a_group_without_a_group_is_for_the_own_group(folder: Path) -> None:
    """Of root no proxy is a member; another user's group may well be the proxy's, too."""
    said = said_at_start(folder, "?mode=0660")

    assert said == said_by_check(folder, "?mode=0660")
    if os.getegid() == 0:
        assert "group root can connect (srw-rw---- " in said[0]
    else:
        assert said == []


def test_a_folder_that_passes_its_group_on_has_chosen_it(folder: Path) -> None:
    folder.chmod(0o2755)
    os.umask(0o007)

    assert said_at_start(folder, "") == said_by_check(folder, "") == []


@together(
    ("mode", "query", "closed_to"),
    [
        (0o750, "?mode=0666", "every user"),
        (0o700, "?mode=0666", "every user"),
        (0o711, "?mode=0666", ""),
        (0o705, "?mode=0660&group={gid}", "group "),
        (0o710, "?mode=0660&group={gid}", ""),
        (0o710, f"?mode=0660&group={OTHER}", f"group {OTHER}"),
        (0o701, f"?mode=0660&group={OTHER}", ""),
        (0o700, f"?user={OTHER}", f"user {OTHER}"),
        (0o701, f"?user={OTHER}", ""),
    ],
)
def test_a_folder_that_is_closed_to_those_whom_the_mode_admits_is_named(
    folder: Path, mode: int, query: str, closed_to: str
) -> None:
    inside = folder / str(len(list(folder.iterdir())))
    inside.mkdir()
    inside.chmod(mode)

    said = said_by_check(inside, query.format(gid=os.getegid()))

    assert len(said) == bool(closed_to), said
    if closed_to:
        assert f"its mode admits {closed_to}" in said[0]
        assert f"but the folder {inside} does not (drwx" in said[0]


@needs_root
def test_what_is_said_is_what_a_proxy_of_that_user_meets(folder: Path) -> None:
    """Each argument is bound, and a process of that group and no other right connects."""
    for mode, query in (
        (0o755, ""),
        (0o755, f"?group={OTHER}"),
        (0o755, f"?mode=0660&group={OTHER}"),
        (0o750, f"?mode=0660&group={OTHER}"),
        (0o755, "?mode=0666"),
        (0o750, "?mode=0666"),
        (0o700, f"?user={OTHER}"),
        (0o755, f"?user={OTHER}"),
    ):
        folder.chmod(mode)
        listens = [parse(f"unix:{folder}/s{query}", "/")]
        bound = bind_all(listens, 16, notice=lambda text: None)
        said = [*unix_access.notices(listens, [each.settings for each in bound])]
        pid = os.fork()
        if pid == 0:
            status = 2
            try:
                os.setgroups([])
                os.setresgid(OTHER, OTHER, OTHER)
                os.setresuid(OTHER, OTHER, OTHER)
                with socket.socket(socket.AF_UNIX) as client:
                    status = 0 if client.connect_ex(f"{folder}/s") == 0 else 1
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        discard_all(bound)

        assert status == len(said), (oct(mode), query, said)


def test_an_access_control_list_is_the_operators_own_choice(folder: Path) -> None:
    packed = bytes.fromhex("0200000001000700ffffffff04000500ffffffff20000500ffffffff")
    try:
        os.setxattr(folder, "system.posix_acl_default", packed)
    except OSError as error:
        needs.skip("access control lists", error.strerror)

    assert said_by_check(folder, "") == []


def test_nothing_is_said_of_what_has_no_file_of_ours(folder: Path) -> None:
    abstract, passed = parse("unix:@x", "/"), parse("fd:web", "/")
    there = (
        ListenerSettings("unix:@x", text="unix:@x"),
        ListenerSettings(f"unix:{folder}/s", inode=1, text="fd:web", foreign=True),
        ListenerSettings(f"unix:{folder}/s", inode=1, text=f"unix:{folder}/s", removed=True),
        ListenerSettings("tcp:127.0.0.1:80", text="80"),
    )
    listens = [abstract, passed, parse(f"unix:{folder}/s", "/"), parse("80", "/")]

    assert [*unix_access.notices(listens, there)] == []
