"""The private folder of notify sockets: its path, its users, what is left of dead ones."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from socketprotector.launch import notify_dir
from socketprotector.launch.notify_dir import PREFIX, NotifyFolder
from socketprotector.model.settings import Identity, ListenerSettings, Settings
from socketprotector.system import control_path
from socketprotector.system.sd_notify import NotifySocket
from tests.namespaces import STRANGER, needs_root, of_user

OURS = frozenset({os.getuid()})
SECRET = os.urandom(12).hex()
IDENTITY = Identity("games", 5, 60, (60,))
#: What a stranger tries: all names that he can learn.
TRIES = """
import os, socket, sys
folder = sys.argv[1]
names = []
try:
    names += os.listdir(folder)
except PermissionError:
    print("cannot list")
with open("/proc/net/unix") as file:
    names += [line.split()[-1] for line in file if folder in line]
print(len(names), "names")
for name in names:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        try:
            one.sendto(b"x", os.path.join(folder, name))
            print("sent")
        except OSError as error:
            print(error.strerror)
"""


@pytest.fixture
def place() -> Path:
    """Where control sockets are, of which none was made yet."""
    return Path(os.environ["XDG_RUNTIME_DIR"]) / "socketprotector"


@pytest.fixture(autouse=True)
def _nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(control_path, "SYSTEM", str(tmp_path / "system" / "none"))
    monkeypatch.setattr(notify_dir, "_LAST_RESORT", str(tmp_path / "anybodys"))


def settings(control: Path | None = None, identity: Identity | None = None) -> Settings:
    bound = ListenerSettings(f"unix:{control}") if control is not None else None
    return Settings("x", ("x",), "/", control=bound, identity=identity, secret=SECRET)


def made(found: Settings) -> NotifyFolder:
    notices: list[str] = []
    folder = notify_dir.make(found, notices.append)
    assert folder is not None, notices
    assert notices == []
    return folder


@pytest.fixture
def folder(place: Path) -> Iterator[NotifyFolder]:
    one = made(settings())
    yield one
    one.discard()


def test_it_is_ours_and_no_other_user_may_list_it(folder: NotifyFolder, place: Path) -> None:
    found = os.stat(folder.path)

    assert Path(folder.path).parent == place
    assert stat.S_IMODE(found.st_mode) == 0o711
    assert found.st_uid == os.geteuid()


@needs_root
def test_it_is_given_to_the_protectors_user(place: Path) -> None:
    folder = made(settings(identity=IDENTITY))

    found = os.stat(folder.path)
    assert (found.st_uid, found.st_gid) == (IDENTITY.uid, IDENTITY.gid)
    folder.discard()


def test_it_stands_beside_the_control_socket(place: Path) -> None:
    own = place.parent / "own"
    own.mkdir()

    folder = made(settings(own / "control"))

    assert Path(folder.path).parent == own
    folder.discard()
    assert list(own.iterdir()) == []


@needs_root
def test_a_stranger_cannot_find_a_socket_in_it_nor_fill_it(folder: NotifyFolder) -> None:
    notify = NotifySocket.make(f"{folder.path}/{SECRET}-1", OURS)
    with of_user(STRANGER, TRIES, folder.path) as process:
        said = process.communicate()[0].decode().splitlines()

    assert said == ["cannot list", "1 names", "No such file or directory"]
    assert SECRET not in Path("/proc/net/unix").read_text()
    assert notify.peek(1) is None
    notify.close()


@needs_root
def test_any_process_that_was_given_the_name_may_speak(folder: NotifyFolder) -> None:
    notify = NotifySocket.make(f"{folder.path}/{SECRET}-1", OURS)
    says = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM);"
        "s.sendto(b'READY=1', sys.argv[1])"
    )
    with of_user(STRANGER, says, notify.address) as process:
        assert process.wait() == 0
        assert notify.peek(process.pid) == {"READY": "1"}  # a worker that has become another user
        assert notify.peek(1) == {}
    notify.close()


def test_nothing_is_left_of_a_socket_that_is_closed(folder: NotifyFolder) -> None:
    sockets = [NotifySocket.make(f"{folder.path}/{SECRET}-{n}", OURS) for n in range(3)]
    assert sorted(os.listdir(folder.path)) == [f"{SECRET}-{n}" for n in range(3)]

    for each in sockets:
        each.close()

    assert os.listdir(folder.path) == []


def test_a_program_that_was_killed_while_it_bound_one_is_not_in_the_way(
    folder: NotifyFolder,
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as half:
        half.bind(f"{folder.path}/new")

    NotifySocket.make(f"{folder.path}/{SECRET}-1", OURS).close()

    assert os.listdir(folder.path) == []


def test_what_a_killed_program_has_left_in_it_is_removed_with_it(place: Path) -> None:
    folder = made(settings())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
        left.bind(f"{folder.path}/{SECRET}-1")

    folder.discard()

    assert list(place.iterdir()) == []


def test_a_link_in_its_place_is_not_followed(place: Path, tmp_path: Path) -> None:
    """Its user, as whom workers run, can make one; then the next program may still be root."""
    folder = made(settings())
    os.rmdir(folder.path)
    os.symlink(tmp_path, folder.path)
    others = tmp_path / "others"
    others.touch()

    folder.discard()

    assert others.exists()


def test_what_a_killed_one_has_left_is_removed_by_the_next_start(place: Path) -> None:
    killed = made(settings())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
        left.bind(f"{killed.path}/{SECRET}-1")
    living = made(settings())
    assert Path(killed.path).exists()  # it lived when this one started
    os.close(killed.fd)

    last = made(settings())

    assert sorted(place.iterdir()) == sorted([Path(living.path), Path(last.path)])
    for each in (living, last):
        each.discard()


def test_a_folder_of_another_program_with_a_like_name_stays(place: Path) -> None:
    others = place / ".notify-settings"
    others.mkdir(parents=True)
    (others / "file").touch()

    made(settings()).discard()

    assert (others / "file").exists()


def test_it_lives_as_long_as_any_process_holds_its_descriptor(place: Path) -> None:
    folder = made(settings())
    guards = os.dup(folder.fd)
    os.close(folder.fd)

    made(settings()).discard()

    assert Path(folder.path).exists()
    os.close(guards)
    made(settings()).discard()
    assert not Path(folder.path).exists()


@needs_root
def test_what_is_another_users_is_left_alone(place: Path) -> None:
    made(settings()).discard()
    theirs = place / f"{PREFIX}theirs"
    theirs.mkdir()
    os.chown(theirs, STRANGER, -1)
    (place / f"{PREFIX}link").symlink_to("/etc")
    (place / f"{PREFIX}file").touch()

    made(settings()).discard()

    assert sorted(each.name for each in place.iterdir()) == [
        f"{PREFIX}file",
        f"{PREFIX}link",
        f"{PREFIX}theirs",
    ]


def test_where_its_lock_is_taken_meanwhile_another_one_is_made(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another start sweeps it between mkdir() and flock()."""
    real = os.open
    swept: list[str] = []

    def sweeping(path: str, flags: int, *more: int) -> int:
        if PREFIX in str(path) and not swept:
            swept.append(path)
            os.rmdir(path)
        return real(path, flags, *more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", sweeping)
        folder = made(settings())

    assert swept
    assert swept[0] != folder.path
    folder.discard()


def refused(found: Settings) -> str:
    """What is reported where none can be made; by --check in the same words."""
    notices: list[str] = []
    notify_dir.make(found, notices.append, dry=True)
    assert notify_dir.make(found, notices.append) is None
    assert len(notices) == 2
    assert notices[0] == notices[1]
    return notices[0]


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only one there is; root is stopped by other things than rights."""
    only = Path(os.environ["XDG_RUNTIME_DIR"]) / "only"
    only.mkdir()
    file = only.parent / "file"
    file.touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(file))  # no folder can be made in a file
    return only


def test_where_no_folder_can_be_made_it_is_said(nowhere: Path) -> None:
    said = refused(settings(nowhere / "none" / "control"))

    assert said.startswith("no private folder for the workers' notify sockets (")
    assert "No such file or directory" in said
    assert "Not a directory" in said
    assert said.endswith("they are abstract, so any local user can fill their queues")


def test_a_folder_in_which_others_could_rename_it_is_not_used(nowhere: Path) -> None:
    nowhere.chmod(0o777)
    assert f"{nowhere}: others could remove it" in refused(settings(nowhere / "control"))

    nowhere.chmod(0o1777)
    made(settings(nowhere / "control")).discard()


@needs_root
def test_a_folder_that_workers_of_other_users_cannot_enter_is_not_used(nowhere: Path) -> None:
    nowhere.chmod(0o700)

    closed = f"{nowhere}: {nowhere} is closed to other users"
    assert closed in refused(settings(nowhere / "control"))


def test_a_path_that_leaves_no_room_for_names_is_not_used(nowhere: Path) -> None:
    long = nowhere / ("x" * 60)
    long.mkdir()

    assert "File name too long" in refused(settings(long / "control"))


def test_the_longest_path_that_is_used_has_room_for_the_longest_name(nowhere: Path) -> None:
    name = f"{SECRET}-{10**10 - 1}"
    length = 107 - len(f"/{PREFIX}01234567/{name}")  # a longer path cannot be connected to
    longest = nowhere / "x".ljust(length - len(f"{nowhere}/"), "x")
    longer = Path(f"{longest}x")
    for each in (longest, longer):
        each.mkdir()

    folder = made(settings(longest / "control"))
    notify = NotifySocket.make(f"{folder.path}/{name}", OURS)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as worker:
        worker.connect(notify.address)
    notify.close()
    folder.discard()

    assert "File name too long" in refused(settings(longer / "control"))


def test_check_makes_nothing(place: Path) -> None:
    notices: list[str] = []
    notify_dir.make(settings(), notices.append, dry=True)

    assert notices == []
    assert not place.exists()
