"""What a process that reads the configuration again answers, and what becomes of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from socketprotector.daemon.config_reader import ConfigAnswer, ConfigReader
from socketprotector.launch import cli, port_owner, reload_child
from socketprotector.launch.bind import discard_all
from socketprotector.model.settings import ListenerSettings, Settings
from socketprotector.system.loop import Loop
from tests.boundary.ending import settle

COMMAND = (sys.executable, "-P", "-m", "socketprotector")


@pytest.fixture
def loop() -> Iterator[Loop]:
    here = os.getcwd()
    made = Loop()
    yield made
    made.close()
    os.chdir(here)  # to start a process takes the resident one to the root, where it is anyway


class Web:
    """A file, and the settings of a protector that was started with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.says('listen = "127.0.0.1:0"\nworkers = 2\n')
        asked = cli.parse(["--config", str(path)])
        assert asked is not None
        there = (ListenerSettings("tcp:127.0.0.1:4321", text="127.0.0.1:0"),)
        self.settings = replace(asked.settings, listeners=there)

    def says(self, text: str) -> None:
        self.path.write_text(f'command = ["{sys.executable}", "-V"]\n{text}')


@pytest.fixture
def web(tmp_path: Path) -> Web:
    return Web(tmp_path / "web.toml")


def read(
    loop: Loop,
    settings: Settings,
    *,
    dry: bool = False,
    command: tuple[str, ...] = COMMAND,
) -> ConfigAnswer:
    answers: list[ConfigAnswer] = []

    def done(answer: ConfigAnswer) -> None:
        answers.append(answer)
        loop.running = False

    reader = ConfigReader(command, loop, "reader")
    loop.running = True
    reader.read(settings, done, dry=dry)
    if not answers:
        loop.run()
    assert not reader.busy
    return answers[0]


def test_it_answers_with_settings_and_the_listeners_that_were_added(
    loop: Loop, web: Web, tmp_path: Path
) -> None:
    web.says(f'listen = ["127.0.0.1:0", "unix:{tmp_path}/s?backlog=5"]\nworkers = 3\n')

    answer = read(loop, web.settings)

    assert answer.settings is not None, answer
    assert answer.settings.workers == 3
    assert [each.address for each in answer.settings.listeners] == [
        "tcp:127.0.0.1:4321",
        f"unix:{tmp_path}/s",
    ]
    assert answer.settings.secret == web.settings.secret
    assert answer.settings.origin == web.settings.origin
    (fd,) = answer.listeners.values()
    assert list(answer.listeners) == [1]
    with socket.socket(fileno=fd) as added:
        assert added.getsockname() == f"{tmp_path}/s"
        assert added.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_where_workers_accept_each_address_has_three_sockets_of_which_two_listen(
    loop: Loop, web: Web, tmp_path: Path
) -> None:
    """The third one is for a hold; a UNIX path has two, and gets the third one then."""
    web.says('handoff = "listener"\nlisten = "127.0.0.1:0"\n')
    asked = cli.parse(["--config", str(web.path)])
    assert asked is not None
    running = replace(asked.settings, listeners=web.settings.listeners)
    web.says(
        f'handoff = "listener"\nlisten = ["127.0.0.1:0", "127.0.0.2:0", "unix:{tmp_path}/s"]\n'
    )

    answer = read(loop, running)

    assert answer.settings is not None, answer
    assert ([*answer.siblings], [*answer.reserved]) == ([1, 2], [1])
    found = [each[1] for each in (answer.listeners, answer.siblings, answer.reserved)]
    with ExitStack() as stack:
        for fd in (answer.listeners[2], answer.siblings[2]):
            stack.callback(os.close, fd)
        sockets = [stack.enter_context(socket.socket(fileno=fd)) for fd in found]
        assert len({each.getsockname() for each in sockets}) == 1
        listens = [each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for each in sockets]
        assert listens == [1, 1, 0]


def test_asked_only_what_would_change_it_binds_nothing(
    loop: Loop, web: Web, tmp_path: Path
) -> None:
    web.says(f'listen = ["unix:{tmp_path}/s"]\nname = "x"\n[env]\nA = "secret"\n')

    answer = read(loop, web.settings, dry=True)

    name = Path(sys.executable).name
    assert answer.changes == (
        f"name: {name} -> x; needs a restart",
        "workers: 2 -> 1",
        "env: + A",
        "listen: - tcp:127.0.0.1:4321",
        f"listen: + unix:{tmp_path}/s",
    )
    assert answer.fixed == answer.changes[:1], "a reload would be refused for these"
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("dry", [False, True])
def test_mistakes_come_back_line_by_line(loop: Loop, web: Web, dry: bool) -> None:
    web.says("workers = 0\ncolour = 1\n")

    answer = read(loop, web.settings, dry=dry)

    assert answer.settings is None
    assert answer.failure.split("\n") == [
        f"{web.path} line 2: workers: 0 is not in the range 1<=x<=1000000",
        f"{web.path} line 3: colour: unknown key; docs/reference.md lists them",
    ]


def test_what_cannot_change_and_what_cannot_be_bound_are_reported_together(
    loop: Loop, web: Web, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        web.says(f'listen = ["127.0.0.1:{port}", "unix:{tmp_path}/s"]\nname = "x"\nguard = true\n')

        lines = read(loop, web.settings).failure.split("\n")

    assert len(lines) == 3
    assert lines[0].startswith("cannot change at a reload: name: ")
    assert lines[1] == "cannot change at a reload: guard: false -> true; needs a restart"
    assert lines[2].startswith(f"cannot listen on 127.0.0.1:{port}")
    assert not (tmp_path / "s").exists()


def test_a_path_of_the_control_socket_that_was_removed_needs_a_restart(
    loop: Loop, web: Web
) -> None:
    settings = replace(web.settings, control=ListenerSettings("unix:/srv/web/control"))
    said = "control: /srv/web/control -> the usual path"

    assert read(loop, settings, dry=True).fixed == (f"{said}; needs a restart",)

    usual = ListenerSettings("unix:/run/socketprotector/web.control")
    assert read(loop, replace(settings, control=usual), dry=True).fixed == ()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_an_address_of_this_instance_is_no_reason_to_stop_it(
    loop: Loop, web: Web, kind: str
) -> None:
    """A removed listener is in use until its workers have exited; they are children of ours."""
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as taken:
        taken.bind("" if kind == "unix" else ("127.0.0.1", 0))
        taken.listen()
        name = taken.getsockname()
        listen = f"unix:@{name[1:].decode()}" if kind == "unix" else f"127.0.0.1:{name[1]}"
        web.says(f'listen = "{listen}"\n')

        failure = read(loop, web.settings).failure

        assert "stop that" not in failure
        advice = "leave it out, and add it when the old workers have exited"
        assert failure.endswith(f"; SocketProtector has it: {advice}")
        with subprocess.Popen((sys.executable, "-c", "input()"), stdin=subprocess.PIPE) as child:
            port_owner.protector = os.getpid()
            try:
                said = port_owner._advice([child.pid], lambda _: False)
                assert f"its process {child.pid} has it" in said
            finally:
                port_owner.protector = 0


ELSE = "stop that program, or choose another address"
#: A process that has the name of a protector and a listening socket, and whose child listens, too.
#: It prints both ports and the child's pid.
PARENT = """
import os, socket, sys
open("/proc/self/comm", "w").write("SocketProtector")
shared = socket.create_server(("127.0.0.1", 0))
if os.fork() == 0:
    open("/proc/self/comm", "w").write("server")
    own = socket.create_server(("127.0.0.1", 0))
    print(shared.getsockname()[1], own.getsockname()[1], os.getpid(), flush=True)
sys.stdin.read()
"""


def test_a_protector_is_named_and_not_its_worker_that_accepts() -> None:
    """But the worker is named if it has bound the address itself."""
    words = (sys.executable, "-S", "-c", PARENT)
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        shared, own, child = map(int, parent.stdout.readline().split())
        of_shared, of_own = (port_owner.of_port("127.0.0.1", each) for each in (shared, own))
        port_owner.protector = -1  # at a reload of another protector
        try:
            of_another = port_owner.of_port("127.0.0.1", shared)
        finally:
            port_owner.protector = 0

    protector = f"process {parent.pid} (SocketProtector) has it: "
    assert of_shared.startswith(f"{protector}if that is this instance, use ")
    assert of_own == f"process {child} (server) has it: {ELSE}"
    assert of_another == f"{protector}{ELSE}"  # at a reload, `diff` would ask itself


def test_a_process_is_named_though_an_ancestor_may_not_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `hidepid=1` a user may read only the user's own processes."""
    real = psutil.Process.parent

    def parent(process: psutil.Process) -> psutil.Process | None:
        if process.pid == os.getpid():
            raise psutil.AccessDenied(os.getppid())
        return real(process)

    monkeypatch.setattr(psutil.Process, "parent", parent)
    words = (sys.executable, "-c", "open(0).read()")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        holder = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[taken.fileno()])
        port = taken.getsockname()[1]
    with holder:
        said = port_owner.of_port("127.0.0.1", port)
        monkeypatch.setattr(port_owner, "protector", os.getpid())
        at_a_reload = port_owner.of_port("127.0.0.1", port)

    assert said.startswith(f"process {holder.pid} (python")
    assert at_a_reload.startswith(f"its process {holder.pid} has it: leave it out")


@pytest.mark.parametrize("reaped", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_process_that_has_ended_meanwhile_is_not_named(
    monkeypatch: pytest.MonkeyPatch, reaped: bool, at_once: bool
) -> None:
    """/proc is read before the processes found there are looked at, and again if none runs."""
    real = psutil.net_connections
    with (
        subprocess.Popen((sys.executable, "-c", "")) as ended,
        socket.create_server(("127.0.0.1", 0)) as taken,
        subprocess.Popen(
            (sys.executable, "-c", "open(0).read()"),
            stdin=subprocess.PIPE,
            pass_fds=[taken.fileno()],
        ) as holder,
    ):
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        if reaped:
            ended.wait()
        port = taken.getsockname()[1]
        taken.close()
        times = iter(range(2))

        def net_connections(kind: str) -> list[object]:
            found: list[Any] = [each for each in real(kind) if each.pid == holder.pid]
            if next(times) == 0:
                return [found[0]._replace(pid=ended.pid), *(found if at_once else [])]
            return found

        monkeypatch.setattr(psutil, "net_connections", net_connections)
        said = port_owner.of_port("127.0.0.1", port)
        pid = holder.pid

    assert said.startswith(f"process {pid} (python")


def test_an_address_that_is_bound_already_is_kept_whatever_it_is_called_now(
    loop: Loop, web: Web
) -> None:
    listener = replace(web.settings.listeners[0], text="127.0.0.1:4321?backlog=7")
    settings = replace(web.settings, listeners=(listener,))
    web.says('listen = ["http=127.0.0.1:4321?backlog=7"]\n')

    answer = read(loop, settings)

    assert answer.settings is not None, answer
    (listener,) = answer.settings.listeners
    assert (listener.name, listener.removed) == ("http", False)


@pytest.mark.parametrize(
    "options", ["", "?backlog=7", pytest.param("?nonblock=1", marks=pytest.mark.costly)]
)
def test_other_options_of_a_bound_listener_are_listed_and_take_effect_at_a_restart(
    loop: Loop, web: Web, tmp_path: Path, options: str
) -> None:
    path = f"unix:{tmp_path}/s"
    there = ListenerSettings(path, text=f"{path}?backlog=5", name="s")
    settings = replace(web.settings, listeners=(there,))
    web.says(f'listen = ["http={path}{options}"]\nworkers = 2\n')
    said = f"listen: {path}?backlog=5 -> http={path}{options} (options: at a restart)"

    assert read(loop, settings, dry=True).changes == (said,)
    answer = read(loop, settings)

    assert answer.settings is not None, answer
    (listener,) = answer.settings.listeners
    assert (listener.address, listener.name, listener.removed) == (path, "http", False)
    late = "bound already; its options after the ? take effect at a restart"
    assert answer.settings.notices == (f"http={path}{options}: {late}",)
    assert answer.changes == (said,)
    again = read(loop, answer.settings)
    assert again.settings is not None
    assert again.changes == ()
    assert again.settings.listeners == answer.settings.listeners


def test_a_second_reload_keeps_an_address_that_was_bound_with_other_options(
    loop: Loop, web: Web, tmp_path: Path
) -> None:
    """The first one adds the port's other address, with the new options."""
    there = ListenerSettings("tcp:0.0.0.0:4321", text="0.0.0.0:4321?backlog=5")
    settings = replace(web.settings, listeners=(there,))
    web.says('listen = "4321?backlog=6"\n')

    answer = read(loop, settings)
    for fd in answer.listeners.values():
        os.close(fd)
    assert answer.settings is not None, answer
    assert [each.removed for each in answer.settings.listeners] == [False, False]

    again = read(loop, answer.settings)
    assert again.settings is not None
    assert again.settings.listeners == answer.settings.listeners


def test_a_port_alone_can_get_a_name_where_its_socket_also_accepts_ipv4(
    loop: Loop, web: Web
) -> None:
    """Under `listener` a port alone is one socket of [::], with an option that nobody typed."""
    there = ListenerSettings("tcp:[::]:4321", text="4321", name="4321")
    web.says('handoff = "listener"\nlisten = "4321"\n')
    asked = cli.parse(["--config", str(web.path)])
    assert asked is not None
    settings = replace(asked.settings, listeners=(there,))
    web.says('handoff = "listener"\nlisten = "web=4321"\n')

    assert read(loop, settings, dry=True).changes == ("listen: 4321 -> web=4321",)
    answer = read(loop, settings)

    assert answer.settings is not None, answer
    (listener,) = answer.settings.listeners
    assert (listener.name, listener.text) == ("web", "web=4321")
    assert answer.settings.notices == ()


@pytest.mark.parametrize(
    ("mode", "address"), [("connection", "tcp:[::]:4321"), ("listener", "tcp:0.0.0.0:4321")]
)
def test_a_port_alone_can_get_a_name_where_its_socket_was_passed_in(
    loop: Loop, web: Web, mode: str, address: str
) -> None:
    """As at a start, the argument then means this socket alone."""
    there = ListenerSettings(address, text="4321", name="4321", foreign=True)
    web.says(f'handoff = "{mode}"\nlisten = "4321"\n')
    asked = cli.parse(["--config", str(web.path)])
    assert asked is not None
    settings = replace(asked.settings, listeners=(there,))
    web.says(f'handoff = "{mode}"\nlisten = "web=4321"\n')

    assert read(loop, settings, dry=True).changes == ("listen: 4321 -> web=4321",)


def test_a_host_name_means_more_than_the_passed_socket_of_one_of_its_addresses(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a start, a host name means no passed socket."""
    found = [(socket.AF_INET, 0, 0, "", (host, 0)) for host in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: found)
    there = ListenerSettings("tcp:127.0.0.1:4321", text="127.0.0.1:4321", foreign=True)
    web.says('listen = "web.example:4321"\n')
    parsed = cli.parse(["--config", str(web.path)])
    assert parsed is not None

    listeners, _ = reload_child._listeners([there], parsed, lambda line: None, dry=True)

    assert [each.address for each in listeners] == ["tcp:127.0.0.1:4321", "tcp:127.0.0.2:4321"]


@pytest.mark.parametrize("dry", [False, pytest.param(True, marks=pytest.mark.costly)])
def test_one_address_twice_is_refused_as_at_a_start(
    loop: Loop, web: Web, tmp_path: Path, dry: bool
) -> None:
    there = ListenerSettings(f"unix:{tmp_path}/s", text=f"unix:{tmp_path}/s")
    settings = replace(web.settings, listeners=(there,))
    lines = (
        f'listen = ["unix:{tmp_path}/s", "unix:{tmp_path}//s"]\n',
        f'listen = ["unix:{tmp_path}/n", "unix:{tmp_path}//n"]\n',
    )
    for line in lines:
        web.says(line)
        assert "leave one of them out" in read(loop, settings, dry=dry).failure, line

    web.says(f'listen = ["unix:{tmp_path}//s"]\n')
    answer = read(loop, settings)
    assert answer.settings is not None, answer
    assert [each.removed for each in answer.settings.listeners] == [False], "it is the same one"


def test_host_names_are_resolved_before_a_socket_file_is_made(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resolving may take so long that the reader process is killed, which removes no file."""
    path = tmp_path / "s"

    def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
        assert not path.exists()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    web.says(f'listen = ["unix:{path}", "a.example:0", "unix:{path}2"]\n')
    asked = cli.parse(["--config", str(web.path)])
    assert asked is not None

    _, bound = reload_child._listeners((), asked, lambda text: None, dry=False)

    texts = [each.settings.text for each in bound]
    discard_all(bound)
    assert texts == [f"unix:{path}", "a.example:0", f"unix:{path}2"], "the order of the file"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("/bin/false",), "exited with status 1: it said nothing"),
        (("/no-such-program",), "/no-such-program: No such file or directory"),
        (("/bin/sh", "-c", "kill -9 $$"), "was killed by SIGKILL"),
        (
            ("/bin/sh", "-c", r"printf 'one\n\033[31mred\n' >&2"),
            r"exited with status 0: \x1b[31mred",
        ),
        (("/bin/sleep", "60"), "the configuration was not read within 200ms"),
    ],
)
def test_whatever_becomes_of_it_there_is_an_answer(
    loop: Loop, web: Web, command: tuple[str, ...], said: str
) -> None:
    policy = replace(web.settings.policy, start_timeout_s=0.2 if "60" in command else 30.0)
    answer = read(loop, replace(web.settings, policy=policy), command=command)

    assert said in answer.failure


@pytest.mark.parametrize("answer", [None, ConfigAnswer("called off", code="busy")])
def test_one_that_is_called_off_gives_no_answer_but_the_given_one(
    loop: Loop, web: Web, answer: ConfigAnswer | None
) -> None:
    reader = ConfigReader(("/bin/sleep", "60"), loop, "reader")
    answers: list[ConfigAnswer] = []
    reader.read(web.settings, answers.append)

    reader.call_off(answer)
    reader.call_off(answer)

    assert not reader.busy
    settle(loop)
    assert answers == ([answer] if answer is not None else [])
