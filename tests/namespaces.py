"""Processes of other users, and in user namespaces of their own that share the host's network.

As in a rootless container with --net=host; maps are written by root, as newuidmap does.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import needs
from tests.running import ROOT

#: Inside are 0 to 65535, `nobody` among them; all other users of the host have no number there.
MAP = "0 100000 65536"
#: A user of the host that is not mapped in there.
STRANGER = 54_321
_PROGRAM = Path(__file__).parent / "in_namespace.py"

needs_root = needs.ANOTHER_USER


@contextmanager
def in_user_namespace(
    *command: str | Path,
    users: str = MAP,
    through: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    stderr: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as root there; stdin and stdout are pipes.  It is killed at the end.

    users: the maps of users and groups; "" writes none.  through: executes it, before it is there.
    """
    with subprocess.Popen(
        [*through, any_users_python()[0], _PROGRAM, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "PYTHONPATH": any_users_python()[1], **(environment or {})},
        bufsize=0,
        start_new_session=True,
    ) as process:
        try:
            assert read_line(process) == "here"
            if users:
                for name in ("uid_map", "gid_map"):
                    Path(f"/proc/{process.pid}/{name}").write_text(users)
            tell(process, "")
            yield process
        finally:
            process.kill()


def read_line(process: subprocess.Popen[bytes]) -> str:
    """The next line that it says."""
    assert process.stdout is not None
    return process.stdout.readline().decode().rstrip("\n")


def tell(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line.encode() + b"\n")


def may(user: str, *words: str) -> bool:
    """Return whether a user can run a command."""
    through = ("/bin/sh", "-c", 'exec "$@"', "sh", *words)  # which says no instead of raising
    done = subprocess.run(through, user=user, cwd="/", env={}, capture_output=True)
    return done.returncode == 0


def any_users_python() -> tuple[str, str]:
    """Return the Python of these tests, and the PYTHONPATH with which it runs the command.

    For programs that root starts as another user; skips the test where those could not run it.
    """
    if needs.IS_ROOT:
        needs.another_user()
    path = (str(ROOT), str(ROOT / "client_lib"), *filter(None, sys.path))
    return sys.executable, os.pathsep.join(path)


@contextmanager
def of_user(uid: int, code: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python program as another user, in no group of ours; it is killed at the end."""
    with subprocess.Popen(
        [any_users_python()[0], "-I", "-c", code, *arguments],
        user=uid,
        group=uid,
        extra_groups=[],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        cwd="/",
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def socket_elsewhere() -> Iterator[socket.socket]:
    """A listening socket of another network namespace, as of a unit with PrivateNetwork=yes."""
    code = """if True:
        import socket, sys
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.listen()
        socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"x"], [made.fileno()])
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = ("unshare", "--net", sys.executable, "-I", "-S", "-c", code, str(theirs.fileno()))
        subprocess.run(words, pass_fds=(theirs.fileno(),), check=True)
        _, [fd], _, _ = socket.recv_fds(ours, 1, 1)
    with socket.socket(fileno=fd) as made:
        yield made


@contextmanager
def two_links() -> Iterator[tuple[str, str]]:
    """Two interfaces of this run's own network, each with the same link-local address.

    As a router has them; the hosts are returned, with interface.
    """
    others = (name for _, name in socket.if_nameindex() if not name.startswith(("lo", "sp-")))
    if not needs.IS_ROOT or any(others):
        needs.skip("root, in a network of its own")
    if shutil.which("ip") is None:
        needs.skip("ip")
    names = f"sp-{os.getpid()}-1", f"sp-{os.getpid()}-2"
    hosts = f"fe80::77%{names[0]}", f"fe80::77%{names[1]}"
    try:
        add_links(hosts)
        yield hosts
    finally:
        remove_links(hosts)


def add_links(hosts: tuple[str, str]) -> None:
    """Make the two interfaces of these hosts."""
    names = [each.partition("%")[2] for each in hosts]
    made = _ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
    if made.returncode:
        needs.skip("veth", made.stderr)
    for name in names:
        _ip("addr", "add", "fe80::77/64", "dev", name, "nodad").check_returncode()
        _ip("link", "set", name, "up").check_returncode()


def remove_links(hosts: tuple[str, str]) -> None:
    """Remove both, if they are there."""
    _ip("link", "del", hosts[0].partition("%")[2])


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def at(host: str, port: int) -> tuple[str, int, int, int]:
    """The address of a host with an interface, as connect() takes it."""
    bare, _, interface = host.partition("%")
    return bare, port, 0, socket.if_nametoindex(interface)
