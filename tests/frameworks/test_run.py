"""socketprotector-run: applications as they are, under the real command and alone."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import needs
from tests.frameworks.asking import PATH, port_of
from tests.procfs import children_of, ports_of, running, threads_of
from tests.rounds import rounds
from tests.running import Protector, eventually
from tests.scenarios.tools import spawned
from tests.web import Connection, Traffic, ask_once

RUN = (sys.executable, "-m", "socketprotector_client.run")
PAGES = "tests.frameworks.programs.pages"
LISTENER = ("--handoff", "listener", "--ready", "notify")

needs_both = needs.unless(None not in map(find_spec, ("uvicorn", "waitress")), "uvicorn, waitress")

#: Applications of every shape.
SHAPES = """
import functools
from tests.frameworks.programs.pages import asgi, wsgi

class Asgi:
    async def __call__(self, scope, receive, send):
        await asgi(scope, receive, send)

class Wsgi:
    def __call__(self, environ, start_response):
        return wsgi(environ, start_response)

def wrapped_asgi(scope, receive, send):
    return asgi(scope, receive, send)

async def with_state(state, scope, receive, send):
    await asgi(scope, receive, send)

def with_extra(extra, environ, start_response):
    return wsgi(environ, start_response)

def anything(*args):
    return wsgi(*args)

def make():
    return wsgi

def gives(function):
    @functools.wraps(function)
    def call(*words):
        return function("configuration", *words)
    return call

@gives
def make_configured(configuration):
    return wsgi

def make_nothing():
    return None

class holder:
    app = Asgi()

asgi_object, wsgi_object = Asgi(), Wsgi()
partial_asgi = functools.partial(with_state, {})
partial_wsgi = functools.partial(with_extra, 1)
number = 7
"""

#: An application in a worker that waits for the first request of a client as long as it takes.
PATIENT = """
from socketprotector_client import exit_after_drain
from tests.frameworks.programs.pages import asgi

exit_after_drain._FIRST_REQUEST_S = 600
"""


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    (tmp_path / "shapes.py").write_text(SHAPES)
    (tmp_path / "broken.py").write_text("import no_such_module_of_broken")
    return tmp_path


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> tuple[int, str]:
    """Run the command to its end; return its status and what it complained of."""
    done = subprocess.run(
        [*RUN, *arguments],
        env={**os.environ, **PATH, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.rstrip("\n")


@needs_both
@pytest.mark.parametrize("app", ["asgi", "wsgi"])
def test_it_is_reloaded_under_load_and_its_workers_end_by_themselves(
    protector: Callable[..., Protector], app: str
) -> None:
    daemon = protector("127.0.0.1:0", "--", *RUN, f"{PAGES}:{app}", **PATH).ready()

    with Traffic(("127.0.0.1", daemon.port)) as traffic:
        traffic.wait_for_answers(30)
        daemon.reload()
        traffic.wait_for_answers(30)

    daemon.stop()
    assert not traffic.seen.failures
    assert len(traffic.seen.answers) == 2
    assert daemon.log.count(r'event=exited .*how="exited with status 0"$') == 2


@needs_both
@pytest.mark.parametrize("mode", [(), LISTENER], ids=["connection", "listener"])
@pytest.mark.parametrize("app", ["asgi", "wsgi"])
@pytest.mark.costly
def test_a_draining_worker_answers_what_it_was_asked_and_closes_idle_connections(
    protector: Callable[..., Protector], app: str, mode: tuple[str, ...], tmp_path: Path
) -> None:
    daemon = protector(*mode, "127.0.0.1:0", "--", *RUN, f"{PAGES}:{app}", **PATH).ready()
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    with (
        Connection(("127.0.0.1", daemon.port)) as idle,
        Connection(("127.0.0.1", daemon.port)) as asking,
    ):
        old = idle.ask()
        asking.send(str(gate))
        with gate.open("wb"):
            daemon.reload()
            assert idle.at_end()
        assert asking.answer() == old
        assert asking.closing or asking.at_end()  # uvicorn says so before only with httptools
        assert asking.at_end()
    daemon.log.wait_for(r'event=exited generation=1 .*how="exited with status 0"$')
    daemon.stop()


@needs_both
@pytest.mark.parametrize(
    "words",
    [
        ["shapes:asgi_object"],
        ["shapes:wsgi_object"],
        ["shapes:wrapped_asgi"],
        ["shapes:partial_asgi"],
        ["shapes:partial_wsgi"],
        ["shapes:holder.app"],
        ["--factory", "shapes:make"],
        ["--factory", "shapes:make_configured"],
        ["--wsgi", "shapes:anything", "--threads", "1"],
    ],
    ids=" ".join,
)
@pytest.mark.costly
def test_it_finds_out_by_itself_what_kind_an_application_is(
    shapes: Path, marked_environment: dict[str, str], words: list[str]
) -> None:
    process = subprocess.Popen(
        [*RUN, "--bind", "127.0.0.1:0", *words],
        env={**os.environ, **marked_environment, **PATH},
        cwd=shapes,
    )
    try:
        assert ask_once(("127.0.0.1", port_of(process.pid))) == process.pid
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@needs_both
@pytest.mark.parametrize(
    ("mode", "by_signal"),
    [((), False), (LISTENER, False), (LISTENER, True)],
    ids=["connection", "listener", "SIGTERM"],
)
@pytest.mark.costly
def test_a_client_that_has_just_connected_is_answered_by_a_draining_worker(
    protector: Callable[..., Protector], mode: tuple[str, ...], by_signal: bool, tmp_path: Path
) -> None:
    """Of waitress, too, but that counts a second."""
    (tmp_path / "patient.py").write_text(PATIENT)
    words = (*mode, "--chdir", tmp_path, "127.0.0.1:0", "--", *RUN, "patient:asgi")
    daemon = protector(*words, **PATH).ready()
    address = "127.0.0.1", daemon.port

    with Connection(address) as fresh:
        old = ask_once(address)  # a later client, so the first one was taken, too
        if by_signal:
            count = len(threads_of(old))
            os.kill(old, signal.SIGTERM)
            eventually(lambda: len(threads_of(old)) > count, "a thread looks for unread requests")
        else:
            daemon.reload()
            for _ in range(50):  # so long it looks again and again
                ask_once(address)
        assert fresh.ask(last=True) == old
    daemon.log.wait_for(r'event=exited generation=1 .*how="exited with status 0"$')
    daemon.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_both
@pytest.mark.parametrize("app", ["asgi", "wsgi"])
@pytest.mark.costly
def test_with_the_listeners_themselves_it_is_reloaded_under_load(
    protector: Callable[..., Protector], app: str
) -> None:
    daemon = protector(*LISTENER, "127.0.0.1:0", "--", *RUN, f"{PAGES}:{app}", **PATH).ready()
    reloads = rounds(2, 20)
    with Traffic(("127.0.0.1", daemon.port)) as traffic:
        traffic.wait_for_answers(30)
        for _ in range(reloads):
            daemon.reload()
            traffic.wait_for_answers(30)

    daemon.stop()
    assert not traffic.seen.failures
    assert daemon.log.count(r'event=exited .*how="exited with status 0"$') == reloads + 1


@needs_both
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["shapes"], "cannot use 'shapes': pass MODULE:APP"),
        (["shapes:"], "cannot use 'shapes:': pass MODULE:APP"),
        ([":app"], "cannot use ':app': pass MODULE:APP"),
        (["nowhere.web:app"], "cannot import nowhere.web: there is no module nowhere in"),
        (["shapes.more:app"], "cannot import shapes.more: there is no module shapes"),
        ([".shapes:app"], "cannot import '.shapes'"),
        (["shapes:app"], "cannot find app in shapes: it has no app"),
        (["shapes:holder.x"], "cannot find holder.x in shapes: it has no x"),
        (["shapes:number"], "cannot serve shapes:number: it is int, not an application"),
        (["shapes:anything"], "cannot tell whether shapes:anything is ASGI or WSGI: pass"),
        (["shapes:make"], "pass --asgi or --wsgi; if it returns the application, pass --factory"),
        (["--factory", "shapes:make_nothing"], "shapes:make_nothing() returned: it is NoneType"),
        (["--factory", "shapes:wsgi"], "cannot call shapes:wsgi() without arguments: leave out"),
        (["--asgi", "--wsgi", "shapes:wsgi"], "not allowed with argument"),
        (["--threads", "0", "shapes:wsgi"], "'0' is not a number above 0"),
        ([], "MODULE:APP"),
        (["--bind", "x:y", "shapes:wsgi"], "x:y"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_reported_in_one_line(shapes: Path, words: list[str], complaint: str) -> None:
    bind = [] if "--bind" in words else ["--bind", "127.0.0.1:0"]

    status, said = run(*bind, *words, cwd=shapes)

    assert (status, said.count("\n")) == (2, 0), said
    assert said.startswith("socketprotector-run: ")
    assert complaint in said


def test_without_a_protector_it_must_be_told_where_to_listen(shapes: Path) -> None:
    status, said = run("shapes:wsgi", cwd=shapes)

    assert status == 2
    assert said == (
        "socketprotector-run: no address to listen on: start it by SocketProtector, or "
        "pass --bind ADDRESS"
    )


@needs_both
@pytest.mark.parametrize("app", ["asgi", "wsgi"])
def test_an_address_that_is_taken_is_reported_in_one_line(shapes: Path, app: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"

        status, said = run("--bind", address, f"shapes:{app}", cwd=shapes)

    assert status == 111
    assert said.endswith(f"cannot listen on tcp:{address}: Address already in use")


@pytest.mark.parametrize(("app", "server"), [("asgi", "uvicorn"), ("wsgi", "waitress")])
def test_a_missing_extra_is_reported_with_what_installs_it(
    shapes: Path, app: str, server: str
) -> None:
    # A folder of ours first on the path hides it, as if it were not there.
    (shapes / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        f"util.find_spec = lambda name, *more: None if name == {server!r} else find(name, *more)\n"
    )
    path = f"{shapes}:{PATH['PYTHONPATH']}"

    status, said = run(
        "--bind", "127.0.0.1:0", f"shapes:{app}", cwd=shapes, **{**PATH, "PYTHONPATH": path}
    )

    assert status == 2
    assert said == (
        f"socketprotector-run: cannot serve shapes:{app}: it is {app.upper()} and {server} is "
        f"not installed; pip install 'socketprotector-client[{app}]'"
    )


def test_what_the_module_itself_raises_is_shown_whole(shapes: Path) -> None:
    status, said = run("--bind", "127.0.0.1:0", "broken:app", cwd=shapes)

    assert status == 1
    assert said.startswith("Traceback")
    assert said.endswith("No module named 'no_such_module_of_broken'")


@needs_both
@pytest.mark.parametrize("mode", [(), LISTENER], ids=["connection", "listener"])
@pytest.mark.parametrize("app", ["asgi", "wsgi"])
@pytest.mark.costly
def test_forked_processes_serve_and_are_reloaded_under_load(
    protector: Callable[..., Protector], app: str, mode: tuple[str, ...]
) -> None:
    command = (*RUN, "--processes", "2", f"{PAGES}:{app}")
    daemon = protector(*mode, "127.0.0.1:0", "--", *command, **PATH).ready()

    with Traffic(("127.0.0.1", daemon.port)) as traffic:
        traffic.wait_for_answers(30)
        daemon.reload()
        traffic.wait_for_answers(30)

    daemon.stop()
    assert not traffic.seen.failures
    assert daemon.log.count(r'event=exited .*how="exited with status 0"$') == 2


@needs_both
@pytest.mark.parametrize("app", ["asgi", "wsgi"])
def test_forked_processes_serve_without_a_protector(app: str) -> None:
    command = [*RUN, "--bind", "127.0.0.1:0", "--processes", "2", f"{PAGES}:{app}"]
    with subprocess.Popen(command, env={**os.environ, **PATH}) as parent:
        try:
            eventually(lambda: len(children_of(parent.pid)) == 3, "two children beside a helper")
            ports: list[int] = []

            def listens() -> bool:
                for helper in running("accepting", children_of(parent.pid)):
                    ports.extend(ports_of(helper))
                return bool(ports)

            eventually(listens, "the accepting process listens")
            answers = {ask_once(("127.0.0.1", ports[0])) for _ in range(3)}
        finally:
            parent.terminate()
        assert parent.wait(60) == 0
    assert answers
    assert parent.pid not in answers


#: Answers when a file is there.
GATED = """
import os, pathlib, time
def app(environ, start_response):
    pathlib.Path("asked").touch()
    while not os.path.exists("gate"):
        time.sleep(0.01)
    start_response("200 OK", [("Content-Length", "4")])
    return [b"late"]
"""


@needs_both
@pytest.mark.parametrize("processes", [(), ("--processes", "2")], ids=["one", "forked"])
def test_without_a_protector_a_request_under_way_is_answered_after_term(
    tmp_path: Path, processes: tuple[str, ...]
) -> None:
    (tmp_path / "gated.py").write_text(GATED)
    path = tmp_path / "socket"
    command = [*RUN, "--bind", f"unix:{path}", *processes, "gated:app"]
    with subprocess.Popen(command, env={**os.environ, **PATH}, cwd=tmp_path) as server:
        try:
            eventually(lambda: _accepts(path), "it listens")
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                eventually((tmp_path / "asked").exists, "the application has the request")

                server.terminate()

                eventually(lambda: not _accepts(path), "it has stopped accepting")
                (tmp_path / "gate").touch()
                with client.makefile("rb") as answer:
                    assert answer.read().endswith(b"late")
            assert server.wait(60) == 0
        finally:
            server.kill()


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


#: Notes which process begins and ends its lifespan.
LIVES = """
import os
from tests.frameworks.programs.pages import asgi

def note(word):
    with open(os.environ["LIVES"], "a") as file:
        file.write(f"{word} {os.getpid()}\\n")

async def app(scope, receive, send):
    if scope["type"] != "lifespan":
        await asgi(scope, receive, send)
        return
    for event in "startup", "shutdown":
        await receive()
        note(event)
        await send({"type": f"lifespan.{event}.complete"})
"""


@needs_both
@pytest.mark.costly
def test_each_forked_process_has_an_asgi_lifespan(
    protector: Callable[..., Protector], tmp_path: Path
) -> None:
    (tmp_path / "lives.py").write_text(LIVES)
    notes = tmp_path / "notes"
    path = {**PATH, "PYTHONPATH": f"{tmp_path}:{PATH['PYTHONPATH']}", "LIVES": str(notes)}
    daemon = protector("127.0.0.1:0", "--", *RUN, "--processes", "2", "lives:app", **path).ready()
    began = notes.read_text().split()
    [parent] = spawned(daemon, 1)
    assert began[::2] == ["startup", "startup"]
    assert {int(pid) for pid in began[1::2]} == set(children_of(parent))
    daemon.stop()
    ended = notes.read_text().split()[4:]
    assert ended[::2] == ["shutdown", "shutdown"]
    assert {*ended[1::2]} == {*began[1::2]}


#: Says how many garbage collections there were during the load, and of each child the threshold.
LOADS = """
import gc, sys
from socketprotector_client import post_fork
def collections():
    return sum(each["collections"] for each in gc.get_stats())
before = collections()
kept = [[] for _ in range(100_000)]
sys.stderr.write(f"{collections() - before} collections\\n")
@post_fork
def begin(number):
    frozen = gc.get_freeze_count() > len(kept)
    sys.stderr.write(f"child: {gc.get_threshold()[0]} {frozen}\\n")
def app(environ, start_response): pass
"""


@needs_both
@pytest.mark.parametrize(
    ("last", "threshold"), [("", gc.get_threshold()[0]), ("gc.set_threshold(5000)", 5000)]
)
def test_what_is_forked_was_loaded_without_collections(
    protector: Callable[..., Protector], tmp_path: Path, last: str, threshold: int
) -> None:
    (tmp_path / "loads.py").write_text(LOADS + last)
    path = {**PATH, "PYTHONPATH": f"{tmp_path}:{PATH['PYTHONPATH']}"}
    daemon = protector("127.0.0.1:0", "--", *RUN, "--processes", "2", "loads:app", **path).ready()
    eventually(lambda: daemon.log.count(f"^child: {threshold} True$") == 2, "its children's lines")
    assert daemon.log.count("^0 collections$") == 1


def test_a_thread_of_the_application_is_refused_at_the_fork(shapes: Path) -> None:
    (shapes / "threaded.py").write_text(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, name='metrics', daemon=True).start()\n"
        "def app(environ, start_response): pass\n"
    )

    status, said = run("--bind", "127.0.0.1:0", "--processes", "2", "threaded:app", cwd=shapes)

    assert (status, said.count("\n")) == (1, 0), said
    assert "cannot fork while threads run ('metrics')" in said
