"""Every form of LISTEN, bound by the real command and answered by a real worker."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from socketprotector.ctl.api import why_not_ready
from tests import needs
from tests.procfs import listening_descriptors, name_of
from tests.running import COMMAND, MARK, ask, eventually, marked, wait_gone
from tests.scenarios.operating import Line
from tests.scenarios.starting import MINIMAL, TELLS, Start, has_ipv6, needs_ipv6, tcp, told

needs_root = needs.ROOT


def option(start: Start, level: int, name: int, index: int = 0) -> int:
    """A socket option of a listener, asked of a copy taken from the protector."""
    pidfd = os.pidfd_open(start.pid)
    inodes = listening_descriptors(start.pid)
    # pidfd_getfd(2) has no name in Python.
    import ctypes

    fd = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, inodes[index], 0)
    os.close(pidfd)
    if fd < 0:
        needs.skip("pidfd_getfd")
    with socket.socket(fileno=fd) as copy:
        return copy.getsockopt(level, name)


# -- TCP -----------------------------------------------------------------------


@needs_ipv6
def test_a_port_is_two_listeners_with_one_number(start: Start) -> None:
    ended = start.up("0", "--", *TELLS)

    first, second = start.addresses
    assert first.startswith("tcp:0.0.0.0:")
    assert second.startswith("tcp:[::]:")
    port = tcp(first)[1]
    assert tcp(second)[1] == port
    assert ended.out == f"SocketProtector: listening on {first} {second}\n"
    assert told(("127.0.0.1", port))["listener"] == 0
    assert told(("::1", port))["listener"] == 1
    assert told(("::1", port))["environment"]["SOCKETPROTECTOR_LISTENERS"] == f"{first} {second}"
    start.stop()


@needs_ipv6
def test_both_stacks_in_one_listener_where_that_is_asked_for(start: Start) -> None:
    start.up("0?v6only=0", "--", *TELLS)

    (only,) = start.addresses
    assert only.startswith("tcp:[::]:")
    assert told(("127.0.0.1", tcp(only)[1]))["listener"] == 0
    assert told(("::1", tcp(only)[1]))["listener"] == 0
    start.stop()


@pytest.mark.costly
def test_a_port_of_ones_own_choice_is_bound_and_not_said_again(
    start: Start, free_port: Callable[[], int]
) -> None:
    port = free_port()

    ended = start.up(f"127.0.0.1:{port}", "--", *MINIMAL)

    assert ended.out == ""
    assert start.addresses == [f"tcp:127.0.0.1:{port}"]
    assert ask(("127.0.0.1", port)) == "hello"
    start.stop()


@needs_ipv6
@pytest.mark.costly
def test_an_ipv6_address_stands_in_brackets(start: Start) -> None:
    start.up("[::1]:0", "--", *MINIMAL)

    assert start.addresses[0].startswith("tcp:[::1]:")
    assert ask(start.address) == "hello"
    start.stop()


@needs.LOCALHOST
def test_a_name_is_every_address_it_resolves_to(start: Start) -> None:
    found = {str(a[4][0]) for a in socket.getaddrinfo("localhost", None, type=socket.SOCK_STREAM)}
    start.up("localhost:0", "--", *MINIMAL)

    addresses = [tcp(each) for each in start.addresses]
    assert {host for host, _ in addresses} == {h for h in found if ":" not in h or has_ipv6()}
    assert len({port for _, port in addresses}) == 1
    assert [ask(each) for each in addresses] == ["hello"] * len(addresses)
    start.stop()


@needs_root
@needs_ipv6
@pytest.mark.costly
def test_a_name_of_many_addresses_is_bound_on_all_of_them(start: Start) -> None:
    if shutil.which("unshare") is None:
        needs.skip("unshare")
    hosts = start.folder / "hosts.sh"
    hosts.write_text("127.0.0.2 many.example\n127.0.0.3 many.example\n::1 many.example\n")
    script = f'mount --bind {hosts} /etc/hosts || exit 77; exec "$@"'
    before = ("unshare", "-m", "sh", "-c", script, "-")

    ended = start("--log-file", start.log_file, "many.example:0", "--", *MINIMAL, before=before)
    if ended.status == 77:
        needs.skip("mounts" if needs.IS_ROOT else "root")

    assert ended.status == 0, ended
    addresses = [tcp(each) for each in start.addresses]
    assert {host for host, _ in addresses} == {"127.0.0.2", "127.0.0.3", "::1"}
    assert len({port for _, port in addresses}) == 1
    assert [ask(each) for each in addresses] == ["hello"] * 3
    start.stop()


def test_several_listeners_are_told_apart(start: Start) -> None:
    words = ("127.0.0.1:0", f"unix:{start.folder}/a", "127.0.0.1:0", "unix:b")
    start.up(*words, "--", *TELLS)

    first, unix_a, second, unix_b = start.addresses
    assert (unix_a, unix_b) == (f"unix:{start.folder}/a", f"unix:{start.folder}/b")
    assert told(tcp(first))["listener"] == 0
    assert told(f"{start.folder}/a")["listener"] == 1
    assert told(tcp(second))["listener"] == 2
    assert told(f"{start.folder}/b")["listener"] == 3
    start.stop()
    assert start.left() == []


def without_ipv6(start: Start, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a network of its own that has IPv4 only."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        needs.skip("ip, unshare")
    script = (
        "ip link set lo up && echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 || exit 77; "
        'exec "$@"'
    )
    return subprocess.run(
        ["unshare", "-n", "sh", "-c", script, "-", *words],
        capture_output=True,
        text=True,
        env={**start.environment, "PWD": str(start.folder)},
        cwd=start.folder,
        timeout=60,
    )


@needs_root
def test_without_ipv6_only_the_first_is_bound_and_the_log_says_so(start: Start) -> None:
    words = ("--pid-file", str(start.pid_file), "--log-file", str(start.log_file))
    ended = without_ipv6(start, *COMMAND, *words, "0", "--", *MINIMAL)
    if ended.returncode == 77:
        needs.skip("network namespaces" if needs.IS_ROOT else "root")

    assert ended.returncode == 0, ended
    notice = "0: no IPv6 here; listening on 0.0.0.0 only"
    assert ended.stderr == f"SocketProtector: {notice}\n"
    assert f'event=notice text="{notice}"' in start.log
    assert len(start.addresses) == 1
    start.stop()


# -- options of TCP listeners --------------------------------------------------


def test_the_backlog_is_what_was_asked_for(start: Start) -> None:
    start.up("--backlog", "77", "127.0.0.1:0", "127.0.0.1:0?backlog=11", "--", *MINIMAL)

    shown = (
        [
            subprocess.run(
                ["ss", "-Hltn", f"sport = :{tcp(each)[1]}"], capture_output=True, text=True
            ).stdout.split()[2]
            for each in start.addresses
        ]
        if shutil.which("ss")
        else ["77", "11"]
    )
    assert shown == ["77", "11"]
    start.stop()


def test_a_socket_file_that_a_proxys_user_cannot_use_is_reported(start: Start) -> None:
    """Of three listeners only that one, and by --check with the same words."""
    listens = ("unix:s", f"unix:@{start.folder}", "unix:t?mode=0600")
    said = f"unix:{start.folder}/s: only user "

    checked = start("--check", "--log-file", start.log_file, *listens, "--", *MINIMAL)
    ended = start.up(*listens, "--", *MINIMAL)

    [line] = ended.lines
    assert line.startswith(f"SocketProtector: {said}")
    assert "'unix:s?mode=0660&group=GROUP'" in line
    assert checked.lines[0] == line
    assert start.log.count("event=notice") == 1
    assert f'event=notice text="{said}' in start.log
    start.stop()


def test_a_backlog_above_what_the_kernel_allows_is_reported(start: Start) -> None:
    most = int(Path("/proc/sys/net/core/somaxconn").read_text())

    ended = start.up("--backlog", str(most + 1), "127.0.0.1:0", "--", *MINIMAL)

    assert ended.lines == [
        f"SocketProtector: backlog {most + 1} is cut to {most}: raise the sysctl net.core.somaxconn"
    ]
    assert "event=notice" in start.log
    start.stop()


def test_defer_accept_waits_for_the_clients_first_words(start: Start) -> None:
    start.up("127.0.0.1:0?defer_accept=9", "--", *MINIMAL)

    assert option(start, socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT) >= 9
    assert ask(start.address) == "hello"
    start.stop()


def test_freebind_takes_an_address_that_is_not_there_yet(start: Start) -> None:
    start.up("192.0.2.77:0?freebind=1", "--", *MINIMAL)

    assert start.addresses[0].startswith("tcp:192.0.2.77:")
    start.stop(signal.SIGINT)


@needs_ipv6
def test_freebind_works_for_ipv6_too(start: Start) -> None:
    start.up("[2001:db8::77]:0?freebind=1", "--", *MINIMAL)

    assert start.addresses[0].startswith("tcp:[2001:db8::77]:")
    start.stop(signal.SIGINT)


@needs_root
def test_a_listener_is_bound_to_a_device(start: Start) -> None:
    start.up("127.0.0.1:0?device=lo", "--", *MINIMAL)
    assert ask(start.address) == "hello"
    start.stop()

    ended = start("127.0.0.1:0?device=nosuch0", "--", *MINIMAL)
    assert ended.status == 111
    assert "see `ip link` for the devices there are" in ended.err


# -- UNIX ----------------------------------------------------------------------


@pytest.mark.costly
def test_a_unix_socket_is_ours_to_remove_at_the_end(start: Start) -> None:
    start.up("unix:s", "--", *MINIMAL)

    assert stat.S_ISSOCK((start.folder / "s").stat().st_mode)
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()
    assert start.left() == []


@needs_root
def test_a_unix_socket_has_the_mode_and_the_owners_asked_for(start: Start) -> None:
    words = "unix:s?mode=0640&user=nobody&group=0"
    start.up(words, "--", *MINIMAL, umask=0o077)

    found = (start.folder / "s").stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    import pwd

    assert (found.st_uid, found.st_gid) == (pwd.getpwnam("nobody").pw_uid, 0)
    start.stop()


def test_an_abstract_socket_needs_no_file(start: Start) -> None:
    name = f"@socketprotector-test-{os.urandom(8).hex()}"
    start.up(f"unix:{name}", "--", *MINIMAL)

    assert start.addresses == [f"unix:{name}"]
    assert ask("\0" + name[1:]) == "hello"
    ended = start("--pid-file", start.folder / "other", f"unix:{name}", "--", *MINIMAL)
    assert ended.status == 111
    assert f"process {start.pid} (SocketProtector) has it" in ended.err
    start.stop()


def test_a_live_socket_is_not_stolen(start: Start) -> None:
    path = start.folder / "live"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        before = path.stat().st_ino
        ended = start("unix:live", "--", *MINIMAL)

        assert ended.status == 111
        assert f"process {os.getpid()} " in ended.err
        assert path.stat().st_ino == before


def test_a_stale_socket_is_replaced(start: Start) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(start.folder / "s"))

    start.up("unix:s", "--", *MINIMAL)

    assert ask(f"{start.folder}/s") == "hello"
    start.stop()
    assert start.left() == []


def test_another_processs_socket_in_our_place_is_reported_and_not_removed(start: Start) -> None:
    def warnings() -> list[str]:
        with Line(start.folder / "c") as line:
            return [*line.status()["warnings"]]

    start.up("--control", start.folder / "c", "unix:s?mode=0600", "--", *MINIMAL)
    assert warnings() == []
    path = start.folder / "s"
    path.unlink()
    [removed] = warnings()
    assert removed.startswith(f"unix:{path}: its socket file was removed")
    with Line(start.folder / "c") as line:
        [listener] = line.status()["listeners"]
        assert listener["reachable"] is False
        assert why_not_ready(line.status()) == (
            "no client can connect; see the warnings of `status`"
        )
        line.ask("reload")
        verdict = [{"result": "reloaded", "reason": removed}]
        eventually(
            lambda: (
                [
                    {name: each[name] for name in ("result", "reason")}
                    for each in line.status()["reloads"]
                ]
                == verdict
            ),
            "the verdict of the reload",
        )
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        assert warnings() == [removed]
        start.stop()

        assert path.exists()
    path.unlink()


@pytest.mark.costly
def test_eight_starters_with_one_stale_socket_one_wins(start: Start) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(start.folder / "s"))

    starters = [start.popen("unix:s", "--", *MINIMAL) for _ in range(8)]
    results = [(each.communicate(timeout=60), each.returncode) for each in starters]

    assert sorted(status for _, status in results) == [0, *[111] * 7], results
    assert ask(f"{start.folder}/s") == "hello"
    winners = [pid for pid in marked(start.environment[MARK]) if name_of(pid) == "SocketProtector"]
    assert len(winners) == 1
    refusals = [err for (_, err), status in results if status]
    assert all(re.search(r"Address already in use; .+ has it", err) for err in refusals), refusals
    os.kill(winners[0], signal.SIGINT)
    assert not wait_gone(winners)
    eventually(lambda: start.left() == [], "nothing left")
