"""What a worker makes of its environment, and what importing costs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import unquote

import pytest
import socketprotector_client
from socketprotector_client import Channel, ProtocolError, wire
from socketprotector_client.environment import Environment, read_environment


@pytest.fixture
def fds() -> Iterator[tuple[int, int, int]]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with pair[0], pair[1], open(os.devnull) as scoreboard:
        numbers = pair[0].fileno(), pair[1].fileno(), scoreboard.fileno()
        for fd in numbers:
            os.set_inheritable(fd, True)
        yield numbers


def environ(fds: tuple[int, int, int]) -> dict[str, str]:
    return {
        wire.ENV_CHANNEL: str(fds[0]),
        wire.ENV_RETURN: str(fds[1]),
        wire.ENV_LISTENERS: wire.pack_listeners(["tcp:0.0.0.0:80", "unix:/run/a b", "-"]),
        wire.ENV_GENERATION: "7",
        wire.ENV_WORKER: "3",
        wire.ENV_WORKERS: "8",
        wire.ENV_SCOREBOARD: f"{fds[2]}:4096",
    }


@pytest.mark.parametrize(
    ("drain", "stop", "seconds"),
    [("600", "", 600.0), ("2.5", "20", 2.5), ("", "20", 0.0), ("later", "", 0.0), ("", "", None)],
)
def test_a_worker_learns_how_long_it_has_to_end_its_connections(
    fds: tuple[int, int, int], drain: str, stop: str, seconds: float | None
) -> None:
    more = {wire.ENV_DRAIN_SPREAD: drain, wire.ENV_STOP_SPREAD: stop}

    assert read_environment({**environ(fds), **more}).spread_s == seconds


def test_a_worker_learns_its_place_and_keeps_descriptors_to_itself(
    fds: tuple[int, int, int],
) -> None:
    assert vars(read_environment(environ(fds))) == {
        "channel_fd": fds[0],
        "return_fd": fds[1],
        "listeners": ("tcp:0.0.0.0:80", "unix:/run/a b", "-"),
        "workers": 8,
        "board": (fds[2], 4096),
        "passed": (),
        "paths": {},
        "spread_s": None,
    }
    assert [os.get_inheritable(fd) for fd in fds] == [False] * 3


def test_only_the_channel_is_needed(fds: tuple[int, int, int]) -> None:
    found = read_environment({wire.ENV_CHANNEL: str(fds[0])})

    assert vars(found) == {**vars(Environment()), "channel_fd": fds[0]}


def test_a_default_timeout_sets_no_flag_on_the_channel_that_all_workers_share(
    fds: tuple[int, int, int],
) -> None:
    socket.setdefaulttimeout(30)
    try:
        found = read_environment(environ(fds))
        Channel(found.channel_fd).detach()
    finally:
        socket.setdefaulttimeout(None)

    assert os.get_blocking(fds[0])


def test_without_the_variable_there_is_no_protector() -> None:
    assert vars(read_environment({})) == vars(Environment())


def test_a_variable_inherited_without_its_descriptor_is_explained(
    fds: tuple[int, int, int],
) -> None:
    free = os.dup(0)
    os.close(free)
    for number in (free, 0, fds[2]):
        with pytest.raises(ProtocolError, match="inherits the variable but not the descriptor"):
            read_environment({wire.ENV_CHANNEL: str(number)})


def test_a_wrapper_that_passes_the_channel_alone_is_explained(fds: tuple[int, int, int]) -> None:
    free = os.dup(0)
    os.close(free)
    for number in (free, fds[2]):
        with pytest.raises(ProtocolError, match=f"{number} named by SOCKETPROTECTOR_RETURN: it is"):
            read_environment({**environ(fds), wire.ENV_RETURN: str(number)})
    for number in (free, fds[0], fds[1]):
        found = read_environment({**environ(fds), wire.ENV_SCOREBOARD: f"{number}:0"})
        assert found.board == (-1, 0)


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(ProtocolError, match="cannot use SOCKETPROTECTOR_CHANNEL='x'"):
        read_environment({wire.ENV_CHANNEL: "x"})


@pytest.mark.parametrize(
    "word", ["unix:/a%20b%0A", "%C3%BC%ff", "%", "%4", "%+4x", "100%zz%41", "-"]
)
def test_a_listener_s_name_is_read_as_urllib_reads_it(word: str) -> None:
    expected = unquote(word, errors="surrogateescape")

    assert wire.unpack_listeners(f"{word} -") == [expected, "-"]


def test_every_public_name_is_there() -> None:
    for name in socketprotector_client.__all__:
        assert getattr(socketprotector_client, name) is not None
    with pytest.raises(AttributeError):
        _ = socketprotector_client.nothing_of_that_name


def test_the_wire_format_costs_no_other_import() -> None:
    code = (
        "import sys; from socketprotector_client import wire; "
        "print([name for name in ('socket', 'asyncio', 'logging') if name in sys.modules])"
    )

    assert subprocess.check_output([sys.executable, "-c", code]) == b"[]\n"


def test_handed_listeners_are_found_and_kept_from_what_a_worker_starts() -> None:
    """In a process of its own: they stand at fixed numbers."""
    program = """
import contextlib, io, os, socket, sys
from socketprotector_client.environment import passed_listeners, read_environment
listener = socket.create_server(("127.0.0.1", 0))
plain = socket.socket()
os.dup2(os.open(os.devnull, os.O_RDONLY), 30)
for place, one in ((40, listener), (41, plain)):
    os.dup2(one.fileno(), place)
for place, source in ((3, 40), (4, 41), (5, 30), (6, 40)):
    os.dup2(source, place)
variables = {"LISTEN_FDS": "5", "LISTEN_PID": str(os.getpid())}
assert passed_listeners(variables) == (3, 6), passed_listeners(variables)
assert not os.get_inheritable(3) and not os.get_inheritable(6)
os.fstat(4), os.fstat(5)  # what is no listener is left alone
assert passed_listeners({**variables, "LISTEN_PID": "1"}) == ()
assert passed_listeners({**variables, "LISTEN_FDS": "x"}) == ()
assert passed_listeners({}) == ()
assert passed_listeners({**variables, "LISTEN_FDS": "99999"}) == ()
warned = io.StringIO()
with contextlib.redirect_stderr(warned):
    assert passed_listeners({**variables, "LISTEN_FDS": "0"}) == ()
    assert warned.getvalue() == ""
    os.dup2(41, 3)
    assert passed_listeners({**variables, "LISTEN_FDS": "1"}) == ()
assert "LISTEN_FDS=1: no descriptor is a listening stream socket" in warned.getvalue()
os.dup2(40, 3)

# What a protector gives beside them; and where the variables are another one's worker's.
line, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
os.dup2(line.fileno(), 50)
beside = {"SOCKETPROTECTOR_RETURN": "50", "SOCKETPROTECTOR_SCOREBOARD": "30:8192"}
found = read_environment({**variables, **beside})
assert (found.channel_fd, found.passed) == (-1, (3, 6)), found
assert (found.return_fd, found.board) == (50, (30, 8192)), found
assert not os.get_inheritable(50) and not os.get_inheritable(30)
stale = read_environment({**variables, **beside, "SOCKETPROTECTOR_RETURN": "41"})
assert (stale.passed, stale.return_fd, stale.board) == ((3, 6), -1, (-1, 0)), stale
assert vars(read_environment({**beside, "LISTEN_PID": "1"})) == vars(read_environment({}))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
