"""What the load generator of bench/ reports: the longest gap between answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench.processes import built
from tests import needs
from tests.running import DEADLINE_S

pytestmark = needs.unless(shutil.which("cc") is not None, "cc")
#: How long the server, or the load, stands still.
STILL_S = 0.5
REQUESTS = 20
SO_TIMESTAMPNS = 35


class Server:
    """Answers one request after the other."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(DEADLINE_S)
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"

    @contextmanager
    def next_one(self) -> Iterator[None]:
        """Accept a connection, read its request, do what the caller does, and answer."""
        client, _ = self._listening.accept()
        with client:
            client.settimeout(DEADLINE_S)
            request = client.recv(64)
            yield
            client.sendall(request)

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def noted() -> Iterator[None]:
    """Wait until the kernel notes times of arrival: it begins after a socket has asked for them.

    Until then, a time of arrival is the time of the reading (net_enable_timestamp() in
    net/core/dev.c).
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("127.0.0.1", 0))
        own.connect(own.getsockname())
        own.settimeout(DEADLINE_S)
        own.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        delay_s = 0.0
        while delay_s < 0.005:
            own.send(b"x")
            time.sleep(0.01)  # a delay that a true time of arrival shows
            read_s = time.time()
            ((_, _, stamp),) = own.recvmsg(1, 64)[1]
            seconds, nanoseconds = struct.unpack("@ll", stamp)
            delay_s = read_s - seconds - nanoseconds / 1e9
        yield


@contextmanager
def load(server: Server, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run the load; its report is in the dict after the end of the block."""
    command = [built("load"), "--count", str(REQUESTS), *options, server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            seen: dict[str, Any] = {}
            yield running, seen
            seen.update(json.loads(running.communicate(timeout=DEADLINE_S)[0]))
        finally:
            running.kill()


@pytest.mark.parametrize("options", [(), ("--arrivals",), ("--arrivals", "-c", "4")])
def test_a_gap_contains_the_time_in_which_the_server_stands_still(
    server: Server, options: tuple[str, ...]
) -> None:
    with load(server, *options) as (_, seen):
        for number in range(REQUESTS):
            with server.next_one():
                if number == REQUESTS // 2:
                    time.sleep(STILL_S)

    assert (seen["connections"], seen["failed"]) == (REQUESTS, 0)
    assert seen["gap_us"] >= STILL_S * 1e6


@pytest.mark.usefixtures("noted")
def test_by_times_of_arrival_a_gap_lacks_the_time_in_which_the_load_stands_still(
    server: Server,
) -> None:
    """Without these times the gap contains it."""
    gaps = {}
    for options in ((), ("--arrivals",)):
        replied_at, longest_s = time.monotonic(), 0.0
        with load(server, *options) as (running, seen):
            for number in range(REQUESTS):
                with server.next_one():
                    if is_middle := number == REQUESTS // 2:
                        os.kill(running.pid, signal.SIGSTOP)
                        os.waitid(os.P_PID, running.pid, os.WSTOPPED | os.WNOWAIT)
                now = time.monotonic()
                longest_s, replied_at = max(longest_s, now - replied_at), now
                if is_middle:  # it stands still until the next request, too
                    time.sleep(STILL_S)
                    replied_at = time.monotonic()
                    os.kill(running.pid, signal.SIGCONT)
        gaps[options] = seen["gap_us"] / 1e6, longest_s

    gap_s, _ = gaps[()]
    assert gap_s >= STILL_S
    gap_s, longest_s = gaps["--arrivals",]  # at most the server's own longest time
    assert gap_s < longest_s + STILL_S / 2


def test_a_request_that_was_not_answered_makes_a_gap_until_the_end(server: Server) -> None:
    with load(server, "--arrivals", "--timeout", "2") as (_, seen):
        with server.next_one():
            pass
        with server._listening.accept()[0]:
            time.sleep(2 + STILL_S)
        for _ in range(REQUESTS - 2):
            with server.next_one():
                pass

    assert (seen["connections"], seen["timed_out"]) == (REQUESTS - 1, 1)
    assert seen["gap_us"] >= 2e6
