"""client_lib/c/socketprotector.h: each result, in and out of the protocol."""

from __future__ import annotations

import array
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from socketprotector_client import wire

from tests.c.building import PLAIN, SANITIZED, SOURCES, STRICT, Build, installed, working_valgrind
from tests.channel import Channel, Worker
from tests.running import DEADLINE_S, ROOT
from tests.scenarios.tools import hold

#: What the probe says first: its own place, then what each wait came to.
OPENED = ["open 1 0 -1 0", "nothing 1", "nothing 1", "woken 1", "cloexec 1"]
DRAINED = ["drained 1", "again 1", "left -2 0"]
RETIRED = ["retired 1", "again 1", "left -2 0"]


@pytest.mark.parametrize("optimized", ["-O0", "-O2"])
@pytest.mark.parametrize(
    "compiler",
    ["gcc -std=c99", "clang -std=c99", "g++ -x c++ -std=c++11", "clang++ -x c++ -std=c++11"],
)
def test_it_compiles_without_a_warning(compiler: str, optimized: str, tmp_path: Path) -> None:
    name, *flags = shlex.split(compiler)
    path = installed(name)
    for source in SOURCES.values():
        subprocess.run(
            [path, *flags, optimized, *STRICT, "-c", source, "-o", tmp_path / "object"], check=True
        )


def test_it_says_so_when_it_comes_after_a_system_header(tmp_path: Path) -> None:
    header = SOURCES["echo_epoll"].parent.parent / "socketprotector.h"
    source = tmp_path / "late.c"
    source.write_text(f'#include <poll.h>\n#include "{header}"\n')

    gcc = installed("gcc")
    done = subprocess.run(
        [gcc, "-std=c99", "-fsyntax-only", source], capture_output=True, text=True
    )

    assert done.returncode != 0
    assert "include socketprotector.h before any system header" in done.stderr


#: Finds each address twice, as for a name that is in /etc/hosts twice.
DOUBLED = """
#include "socketprotector.h"
int __real_getaddrinfo(const char *, const char *, const struct addrinfo *, struct addrinfo **);
int __wrap_getaddrinfo(const char *, const char *, const struct addrinfo *, struct addrinfo **);
int __wrap_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints,
                       struct addrinfo **found)
{
    int failed = __real_getaddrinfo(host, port, hints, found);
    while (!failed && *found)
        found = &(*found)->ai_next;
    return failed ? failed : __real_getaddrinfo(host, port, hints, found);
}
int main(int argc, char **argv)
{
    struct sp_worker sp;
    for (; argc > 1; argc--, sp_close(&sp))
        printf("%d\\n", sp_open(&sp, *++argv, 0) < 0 ? -1 : sp.count);
    return 0;
}
"""


def test_a_name_that_has_the_same_address_twice_is_listened_on_once(tmp_path: Path) -> None:
    header = SOURCES["echo_epoll"].parent.parent
    source, program = tmp_path / "doubled.c", tmp_path / "doubled"
    source.write_text(DOUBLED)
    gcc = installed("gcc")
    flags = (*STRICT, "-Wl,--wrap=getaddrinfo", "-I", header, "-o", program)
    subprocess.run([gcc, "-std=c99", *flags, source], check=True)

    done = subprocess.run([program, "127.0.0.1:0", "0"], stdout=subprocess.PIPE, text=True)

    alone, everywhere = done.stdout.split()
    assert alone == "1"
    assert everywhere in ("1", "2")  # with IPv6


def probe(channel: Channel, build: Build, *arguments: str, **more: object) -> Worker:
    return channel.start(build("probe", *SANITIZED), *arguments, **more)  # type: ignore[arg-type]


def test_connections_come_with_their_listener_and_then_the_drain(
    channel: Channel, build: Build, tmp_path: Path
) -> None:
    path = tmp_path / "a b%20,é.sock"
    channel.listen_unix(path)
    worker = probe(channel, build)
    assert worker.ready_lines == ["READY=1", "X_SOCKETPROTECTOR_RETIRE=1"]
    assert channel.notify.recv(4096) == b"STATUS=probing"

    first, second = channel.connect(0), channel.connect(1)
    assert [first.ask("one"), second.ask("two")] == ["one", "two"]
    assert [first.hear(), second.hear()] == ["", ""]
    channel.end_channel()

    tcp = f"tcp:127.0.0.1:{channel.listeners[0].getsockname()[1]}"
    length = len(os.fsencode(f"unix:{path}"))
    assert worker.read_rest() == [
        *OPENED,
        f"connection {tcp} {len(tcp)} {tcp[:7]} 1 1",
        f"connection unix:{path} {length} unix:{str(path)[:2]} 1 1",
        *DRAINED,
    ]
    assert worker.wait() == 0


def test_a_listener_that_it_does_not_know_has_no_name(channel: Channel, build: Build) -> None:
    worker = probe(channel, build)

    client = channel.connect_only()
    accepted, _ = channel.listeners[0].accept()
    with accepted:
        channel.send(accepted.fileno(), 7)
    assert client.ask("one") == "one"
    channel.end_channel()

    assert worker.read_rest()[len(OPENED) :] == [
        "connection No such file or directory -1  1 1",
        *DRAINED,
    ]


def test_it_retires_before_it_takes_what_is_queued(channel: Channel, build: Build) -> None:
    worker = probe(channel, build)
    hold(worker.pid)  # so that both have come when it looks
    channel.connect()
    worker.retire()
    os.kill(worker.pid, signal.SIGCONT)

    assert worker.read_rest() == [*OPENED, *RETIRED]
    assert worker.wait() == 0
    assert channel.queued() == 1


@pytest.mark.parametrize("what", [{"version": 2}, {"kind": 2, "state": b"abc"}])
def test_a_message_of_another_kind_closes_its_connection_only(
    channel: Channel, build: Build, what: dict[str, int]
) -> None:
    worker = probe(channel, build)

    strange = channel.connect_only()
    channel.hand_off(**what)  # type: ignore[arg-type]
    assert strange.hear() == ""
    channel.send(None)
    assert channel.connect().ask("one") == "one"
    channel.end_channel()

    said = worker.read_rest()[len(OPENED) :]
    assert said[:2] == ["error EPROTO", "error EPROTO"]
    assert said[2].startswith("connection tcp:")
    assert said[3:] == DRAINED


def test_of_two_descriptors_in_one_message_the_unexpected_one_is_closed(
    channel: Channel, build: Build
) -> None:
    worker = probe(channel, build)

    client, extra = channel.connect_only(), channel.connect_only()
    accepted = [channel.listeners[0].accept()[0] for _ in range(2)]
    header = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, 0, 0, time.monotonic_ns())
    rights = array.array("i", [each.fileno() for each in accepted])
    channel.sender.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    for each in accepted:
        each.close()

    assert client.ask("one") == "one"
    assert extra.hear() == ""
    channel.end_channel()
    assert worker.read_rest()[-3:] == DRAINED


def test_without_a_descriptor_to_spare_none_is_taken(channel: Channel, build: Build) -> None:
    worker = probe(channel, build, "full", nofile=64)

    clients = [channel.connect() for _ in range(20)]
    assert [client.ask(str(number)) for number, client in enumerate(clients)] == [
        str(number) for number in range(20)
    ]
    channel.end_channel()

    said = worker.read_rest()[len(OPENED) :]
    assert said[0] == "error EMFILE"
    assert "Software caused connection abort" not in " ".join(said)
    assert sum(line.startswith("connection tcp:") for line in said) == 20
    assert said[-3:] == DRAINED


def test_it_says_watchdog_and_hears_nothing_of_a_protector_that_is_gone(
    channel: Channel, build: Build, tmp_path: Path
) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.settimeout(DEADLINE_S)
        notify.bind(str(path))
        worker = channel.spawn(
            build("probe", *SANITIZED), env={wire.ENV_NOTIFY: str(path), "WATCHDOG_USEC": "20000"}
        )

        heard = [notify.recv(4096)]
        while b"STATUS=probing" not in heard or heard[-1] != b"WATCHDOG=1":
            heard.append(notify.recv(4096))
    channel.end_channel()

    assert heard[0] == b"WATCHDOG=1"
    assert b"READY=1\nX_SOCKETPROTECTOR_RETIRE=1" in heard
    said = worker.read_rest()
    assert (said[0], said[-1]) == ("open 1 0 10 0", "left -2 0")
    assert worker.wait() == 0


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({}, "Destination address required"),
        ({wire.ENV_CHANNEL: ""}, "Bad file descriptor"),
        ({wire.ENV_CHANNEL: "99"}, "Bad file descriptor"),
        ({wire.ENV_CHANNEL: "0"}, "Socket operation on non-socket"),
        ({wire.ENV_CHANNEL: "x"}, "Invalid argument"),
        ({wire.ENV_CHANNEL: "-1"}, "Invalid argument"),
        ({wire.ENV_CHANNEL: "3 "}, "Invalid argument"),
        ({wire.ENV_CHANNEL: "99999999999999999999"}, "Invalid argument"),
    ],
)
def test_a_broken_environment_is_an_error_and_closes_nothing(
    channel: Channel, build: Build, variables: dict[str, str], why: str
) -> None:
    worker = channel.spawn(build("probe", *SANITIZED), alone=True, env=variables)

    assert worker.read_rest() == [f"cannot open: {why}", "left 0"]
    assert worker.wait() == 111


@pytest.mark.parametrize("what", ["stream", "return"])
def test_what_is_no_channel_or_no_line_is_an_error(
    channel: Channel, build: Build, what: str
) -> None:
    variables = {wire.ENV_RETURN: "99"}
    if what == "stream":  # the child's standard output is a socket of another type
        variables = {wire.ENV_CHANNEL: "1"}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [build("probe", *SANITIZED)],
            env={**os.environ, wire.ENV_CHANNEL: str(channel.reader.fileno()), **variables},
            stdout=theirs.fileno(),
            pass_fds=(channel.reader.fileno(),),
        )
        said = ours.recv(4096).decode().splitlines()

    why = {"stream": "Protocol wrong type for socket", "return": "Bad file descriptor"}[what]
    assert said == [f"cannot open: {why}", "left 0"]
    assert done.returncode == 111


@pytest.mark.parametrize("board", ["", "x", "99:0", "0:0", "0:", "1:5"])
def test_what_is_no_scoreboard_is_none(channel: Channel, build: Build, board: str) -> None:
    worker = probe(channel, build, env={wire.ENV_SCOREBOARD: board})

    assert channel.connect().ask("one") == "one"
    channel.end_channel()

    assert worker.read_rest()[-3:] == DRAINED
    assert worker.wait() == 0


def test_a_forked_child_takes_and_leaves_what_is_its_parents(
    channel: Channel, build: Build
) -> None:
    worker = probe(channel, build, "forks", env={"WATCHDOG_USEC": "10000"})
    assert channel.hear()[1] == "STATUS=probing"
    worker.return_line.send(b"news")
    for word in ("one", "two"):
        assert channel.connect().ask(word) == word
    worker.retire()

    said = worker.read_rest()
    assert "retired 1" in said
    assert said[-1] == "left to the parent 4"
    assert worker.wait() == 0
    assert channel.hear_all() == []  # no WATCHDOG=1


def test_nothing_is_read_or_written_out_of_place(channel: Channel, build: Build) -> None:
    valgrind = working_valgrind()
    watched = (valgrind, "-q", "--error-exitcode=9", "--leak-check=full")
    worker = channel.start(*watched, build("probe", *PLAIN))

    assert channel.connect().ask("one") == "one"
    strange = channel.connect_only()
    channel.hand_off(version=2)
    assert strange.hear() == ""
    channel.end_channel()

    assert worker.read_rest()[-4:] == ["error EPROTO", *DRAINED]
    assert worker.wait() == 0, channel.log.read_text()


def test_the_program_of_the_readme_serves(channel: Channel, tmp_path: Path) -> None:
    header = SOURCES["echo_epoll"].parent.parent / "socketprotector.h"
    text = (ROOT / "client_lib" / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```c\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "main.c").write_text(f"void serve(int client);\n{shown}")
    (tmp_path / "serve.c").write_text(
        "#include <unistd.h>\nvoid serve(int client);\n"
        'void serve(int client) { (void)!write(client, "hello\\n", 6); }\n'
    )
    program = tmp_path / "program"
    command = [installed("gcc"), "-std=c99", *STRICT, "-D_GNU_SOURCE", f"-I{header.parent}"]
    subprocess.run([*command, tmp_path / "main.c", tmp_path / "serve.c", "-o", program], check=True)
    worker = channel.start(program)
    client = channel.connect()

    assert client.hear() == "hello"
    client.close()
    channel.end_channel()
    assert worker.wait() == 0
