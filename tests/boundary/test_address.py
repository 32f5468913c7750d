"""What a LISTEN argument means, and what binding gives back when it fails half-way."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from socketprotector.launch import bind, bind_unix
from socketprotector.launch.bind import bind_all
from socketprotector.launch.listen_spec import Listen, parse
from socketprotector.model.errors import Refusal, SystemRefused, UsageError
from socketprotector.system.dir_lock import locked
from tests import needs
from tests.together import together

needs_dual_stack = needs.unless(socket.has_dualstack_ipv6(), "IPv6")


@together(
    ("text", "meaning"),
    [
        ("4321", Listen("4321", 4321)),
        ("0", Listen("0", 0)),
        ("65535", Listen("65535", 65535)),
        ("127.0.0.1:80", Listen("127.0.0.1:80", 80, "127.0.0.1")),
        ("[::1]:80", Listen("[::1]:80", 80, "::1")),
        ("[fe80::1%eth0]:80", Listen("[fe80::1%eth0]:80", 80, "fe80::1%eth0")),
        ("host.example:80", Listen("host.example:80", 80, "host.example")),
        ("unix:/run/x.sock", Listen("unix:/run/x.sock", path="/run/x.sock")),
        ("unix:x.sock", Listen("unix:x.sock", path="/here/x.sock")),
        ("unix:@name", Listen("unix:@name", path="@name")),
        ("unix:/a:b", Listen("unix:/a:b", path="/a:b")),
        (
            "1?backlog=5&defer_accept=2&v6only=0&freebind=1&device=eth0",
            Listen(
                "1?backlog=5&defer_accept=2&v6only=0&freebind=1&device=eth0",
                1,
                options={
                    "backlog": "5",
                    "defer_accept": "2",
                    "v6only": "0",
                    "freebind": "1",
                    "device": "eth0",
                },
            ),
        ),
        (
            "unix:/x?mode=0660&user=0&group=0&backlog=7",
            Listen(
                "unix:/x?mode=0660&user=0&group=0&backlog=7",
                path="/x",
                options={"mode": "0660", "user": "0", "group": "0", "backlog": "7"},
            ),
        ),
    ],
)
def test_an_argument_is_read(text: str, meaning: Listen) -> None:
    assert parse(text, "/here") == meaning


@together(
    "text",
    [
        *("", ":80", "*:80", "::1:80", "host", "host:", "host:http", "65536", "-1", "80 "),
        *("[::1", "[::1:80", "::1]:80", "[::1]x:80", "a[b:80", "[]:80", "[::1]]:80"),
        *("\u00b2", "\u0663", "unix:", "unix:@", "unix:" + "x" * 108),
        *("1?backlog=-1", "1?backlog=99999999999", "1?backlog=\u00b2", "1?v6only=2", "1?device="),
        *("1?mode=660", "unix:/x?device=lo", "unix:/x?mode=8", "unix:/x?mode=-1", "1?nonsense=1"),
        *("unix:/x?user=no-such-user", "unix:/x?group=no-such-group", "1?backlog=0"),
        *("unix:/x?user=a%00", "unix:/x?group=a%00"),
        *("udp:53", "UDP:53", "u53", "0.0.0.0:53/udp"),
    ],
)
def test_a_mistake_is_refused_with_the_argument(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(text, "/")
    assert str(refusal.value).startswith(f"{text}: ")
    assert "\n" not in str(refusal.value)


def bound(*texts: str, folder: Path) -> list[bind.Bound]:
    return bind_all([parse(text, str(folder)) for text in texts], 16, notice=lambda text: None)


def test_when_one_fails_all_before_it_are_given_back(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemRefused, match="Address already in use"):
            bound("unix:s", "127.0.0.1:0", f"127.0.0.1:{port}", folder=tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("127.0.0.1:PORT", "127.0.0.1:PORT", "both are tcp:127.0.0.1:PORT"),
        ("0.0.0.0:PORT", "127.0.0.1:PORT", "tcp:127.0.0.1:PORT and tcp:0.0.0.0:PORT overlap"),
        ("127.0.0.1:PORT", "0.0.0.0:PORT", "tcp:0.0.0.0:PORT and tcp:127.0.0.1:PORT overlap"),
        ("a=0.0.0.0:PORT", "b=0.0.0.0:PORT", "both are tcp:0.0.0.0:PORT"),
        ("unix:s", "unix:s?mode=600", "both are unix:"),
        pytest.param(
            *("127.0.0.1:PORT", "PORT?v6only=0"),
            "tcp:[::]:PORT and tcp:127.0.0.1:PORT overlap",
            marks=needs_dual_stack,
        ),
        pytest.param(
            *("[::]:PORT?v6only=0", "0.0.0.0:PORT"),
            "tcp:0.0.0.0:PORT and tcp:[::]:PORT overlap",
            marks=needs_dual_stack,
        ),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_an_address_that_is_given_twice_is_refused_before_anything_has_it(
    tmp_path: Path, free_port: Callable[[], int], first: str, second: str, told: str, dry: bool
) -> None:
    port = str(free_port())
    texts = [each.replace("PORT", port) for each in (first, second)]
    listens = [parse(each, str(tmp_path)) for each in texts]

    with pytest.raises(UsageError) as refusal:
        bind_all(listens, 16, notice=lambda text: None, dry=dry)

    said = str(refusal.value)
    assert said.startswith(f"cannot listen on {texts[1]} beside {texts[0]}: ")
    assert told.replace("PORT", port) in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []
    socket.create_server(("127.0.0.1", int(port))).close()


def test_addresses_that_do_not_meet_may_have_one_port(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()

    three = bound(f"127.0.0.1:{port}", f"127.0.0.2:{port}", f"[::1]:{port}", folder=tmp_path)

    assert len(three) == 3
    for each in three:
        each.discard()
    # Without v6only=0, [::] takes no IPv4 clients.
    for each in bound(f"127.0.0.1:{port}?v6only=0", f"[::]:{port}", folder=tmp_path):
        each.discard()


def test_all_addresses_and_one_of_them_may_have_different_ports(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    ports = sorted(str(free_port()) for _ in range(2))

    for port, other in (ports, reversed(ports)):
        for each in bound(f"0.0.0.0:{port}", f"127.0.0.1:{other}", folder=tmp_path):
            each.discard()


def test_the_path_of_a_unix_socket_is_no_port(tmp_path: Path, free_port: Callable[[], int]) -> None:
    port = free_port()

    for each in bound(f"0.0.0.0:{port}", f"unix:x:{port}", folder=tmp_path):
        each.discard()


def test_for_an_address_this_process_has_the_advice_is_not_to_stop_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours:
        text = f"127.0.0.1:{ours.getsockname()[1]}"
        with pytest.raises(SystemRefused, match="another listener of this protector has it"):
            bind_all([parse(text, "/")], 16, notice=lambda text: None)


def test_one_number_for_two_sockets_survives_a_number_that_is_half_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel chooses a free port for 127.0.0.1; on 127.0.0.2 it may be taken."""
    addresses = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.2")]
    monkeypatch.setattr(bind, "_addresses", lambda listen, notice: addresses)
    real = bind._bind_one
    taken: list[int] = []

    def half_taken(
        listen: Listen, family: int, host: str, port: int, backlog: int, **more: Any
    ) -> bind.Bound:
        if host == "127.0.0.2" and len(taken) < 3:
            taken.append(port)
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        return real(listen, socket.AddressFamily(family), host, port, backlog, **more)

    monkeypatch.setattr(bind, "_bind_one", half_taken)

    first, second = bound("0", folder=tmp_path)

    assert len(taken) == 3
    assert first.socket.getsockname()[1] == second.socket.getsockname()[1]
    for each in (first, second):
        each.discard()


def test_dry_leaves_nothing(tmp_path: Path) -> None:
    listens = [parse("unix:s", str(tmp_path)), parse("127.0.0.1:0", "/")]

    would = bind_all(listens, 16, notice=lambda text: None, dry=True)

    assert [each.settings.address for each in would] == [f"unix:{tmp_path}/s", "tcp:127.0.0.1:0"]
    assert [each.socket.fileno() for each in would] == [-1, -1]
    assert list(tmp_path.iterdir()) == []


@needs_dual_stack
@pytest.mark.parametrize("mine", ["[::]", "127.0.0.1"])
def test_dry_knows_that_an_ipv6_address_may_take_ipv4_clients(mine: str) -> None:
    """The running protector has the one, and the next start wants the other."""
    dual = mine == "[::]"
    host = "::" if dual else mine
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server((host, 0), family=family, dualstack_ipv6=dual) as running:
        port = running.getsockname()[1]
        wanted = parse(f"127.0.0.1:{port}" if dual else f"{port}?v6only=0", "/")
        taken = {f"tcp:{mine}:{port}"}

        bind_all([wanted], 16, notice=lambda text: None, released=taken, dry=True)

        with pytest.raises(SystemRefused, match="Address already in use"):
            bind_all([wanted], 16, notice=lambda text: None, dry=True)


@needs_dual_stack
def test_dry_knows_that_an_ipv6_address_alone_takes_no_ipv4_clients() -> None:
    """The running protector's IPv4 address does not make another program's IPv6 address free."""
    with socket.create_server(("::", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        wanted, taken = parse(f"[::]:{port}", "/"), {f"tcp:127.0.0.1:{port}"}

        with pytest.raises(SystemRefused, match="Address already in use"):
            bind_all([wanted], 16, notice=lambda text: None, released=taken, dry=True)


def test_a_socket_file_that_was_replaced_is_not_discarded(tmp_path: Path) -> None:
    (ours,) = bound("unix:s", folder=tmp_path)
    (tmp_path / "s").unlink()
    (tmp_path / "s").touch()

    ours.discard()

    assert (tmp_path / "s").exists()


def test_a_socket_that_cannot_be_given_away_is_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(bind_unix, "give_away", refused)

    with pytest.raises(SystemRefused, match="only root can change a socket's owner"):
        bound("unix:s?user=0", folder=tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_socket_has_its_mode_from_the_first_moment(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (ours,) = bound("unix:s?mode=0600", folder=tmp_path)
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        assert os.umask(0) == 0, "the umask is put back"
    finally:
        os.umask(before)
    ours.discard()


# -- the lock of a folder ------------------------------------------------------


def test_a_folder_is_locked_for_one_at_a_time(tmp_path: Path) -> None:
    order = []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with locked(str(tmp_path / "x")):
            order.append("second")

    with locked(str(tmp_path / "x")):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        order.append("first")
    thread.join()

    assert order == ["first", "second"]


def test_a_process_that_keeps_a_folder_locked_does_not_hang_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socketprotector.system.dir_lock._LOCK_S", 0.01)
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)

    with pytest.raises(Refusal, match="another program keeps the folder locked"):
        bound("unix:s", folder=tmp_path)

    os.close(held)
    assert list(tmp_path.iterdir()) == []
