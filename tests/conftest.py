"""What all rings share: the real command, and a look at what a test leaves behind."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter

from tests import forked, needs, once, rounds, summary, world
from tests.channel import Channel
from tests.own_folder import OwnFolder
from tests.procfs import GONE, children_of, descriptors, threads_of
from tests.running import LISTENER, ROOT, Client, Protector, eventually, mark, reserved_port

# An ordinary user's PATH may lack where ip(8), nginx and others are.
os.environ["PATH"] += ":/usr/sbin:/sbin"
# With this variable nothing stays in a buffer, so Python reports a failed write earlier than for
# most users, and never exits with status 120.
os.environ.pop("PYTHONUNBUFFERED", None)


def _set_up_hypothesis() -> None:
    # Before the import, which loads its plugins: trio has one, and that imports trio.
    os.environ["HYPOTHESIS_NO_PLUGINS"] = "1"
    import hypothesis

    # A slow machine is no failure of what makes examples.
    hypothesis.settings.register_profile(
        "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("any machine")
    if not rounds.MANY:
        # Hypothesis takes constants from the source of each module.  In a fresh clone that was 2 s
        # of CPU in each process, for a few examples.
        with suppress(ImportError):  # an old one has no such module
            from hypothesis.internal.conjecture import providers

            providers._get_local_constants = lambda: providers._local_constants


_set_up_hypothesis()

# Collecting makes some 500,000 objects that stay: looking for garbage among them was a third of
# its time.
gc.disable()

# A shell starts what it runs in the background with these ignored, and so does nohup; what tests
# start would inherit that.
for _number, _handler in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(autouse=True, scope="session")
def _programs_are_loaded() -> None:
    """So that no test takes what starts them for something that it has left."""
    forked.begin()


@pytest.fixture(autouse=True)
def _control_sockets_have_a_folder_of_their_own(
    _nothing_is_left_or_changed: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Whatever protector a test starts; short, because a socket's path has 107 bytes.

    Behind the look at what is left, so that monkeypatch has undone everything when that looks.
    """
    with tempfile.TemporaryDirectory(prefix="sp-") as folder:
        os.chmod(folder, 0o1777)  # some are started as another user
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield


@pytest.fixture
def _another_user() -> None:
    needs.another_user()


@pytest.fixture
def marked_environment() -> Iterator[dict[str, str]]:
    """An environment for whatever the test starts; afterwards none of it may live."""
    with mark() as environment:
        yield environment


@pytest.fixture
def handoff(request: pytest.FixtureRequest) -> str:
    """How connections come to workers in this test; EITHER_HANDOFF runs it each way."""
    return str(getattr(request, "param", "connection"))


@pytest.fixture
def handed_over(handoff: str) -> tuple[str, ...]:
    """The options for that: whatever starts a protector here puts them in front of a test's own."""
    return LISTENER if handoff == "listener" else ()


@pytest.fixture
def protector(
    marked_environment: dict[str, str], handed_over: tuple[str, ...]
) -> Iterator[Callable[..., Protector]]:
    """Start the real command in the foreground: protector("127.0.0.1:0", "--", *command)."""
    started: list[Protector] = []

    def start(*arguments: str | Path, **environment: str) -> Protector:
        words = [*handed_over, *(str(each) for each in arguments)]
        started.append(Protector(words, {**marked_environment, **environment}))
        return started[-1]

    yield start
    for each in started:
        each.end()
        print(f"--- log of protector {each.pid} ---\n{each.log.text()}")


@pytest.fixture
def free_port() -> Iterator[Callable[[], int]]:
    """Choose ports of 127.0.0.1 that no other process gets before the test has ended."""
    kept: list[socket.socket] = []

    def choose() -> int:
        kept.append(reserved_port())
        return int(kept[-1].getsockname()[1])

    yield choose
    for each in kept:
        each.close()


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    """A channel and its workers, without a protector: says what a protector would not, too."""
    log = tmp_path / "stderr.log"
    log.touch()
    made = Channel(log)
    yield made
    made.close()
    print(log.read_text())


def _state() -> dict[str, object]:
    """What a test must leave as it was.  A child is that of the thread that has started it."""
    umask = os.umask(0)
    os.umask(umask)
    children = set()
    for thread in threads_of(os.getpid()):
        try:
            children |= {*children_of(os.getpid(), thread)}
        except GONE:
            continue
    return {
        "descriptors": descriptors(os.getpid()),
        "streams that programs inherit": [fd for fd in range(3) if os.get_inheritable(fd)],
        "children": children - forked.source(),
        "threads": threading.active_count(),
        "directory": os.getcwd(),
        "umask": umask,
        "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
    }


@pytest.fixture(autouse=True)
def _nothing_is_left_or_changed() -> Iterator[None]:
    """In this process.  A stream's thread closes its end at end of file, so that is waited for."""
    before = _state()
    yield
    try:
        eventually(lambda: _state() == before, "what there was before")
    except AssertionError:
        assert _state() == before  # which shows what it is


_OWN_FOLDER = pytest.StashKey[OwnFolder]()
_SHARED = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)  # before pytest has made a folder
def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER") is not None:
        return  # in the world of the process that has started this one
    if not config.option.collectonly:
        config.stash[_SHARED] = "" if config.option.shared_world else world.enter(ROOT)
    config.stash[_OWN_FOLDER] = own = OwnFolder()
    os.environ["TMPDIR"] = tempfile.tempdir = str(own.path)
    if config.option.basetemp is None:
        config.option.basetemp = own.path / "0"  # pytest makes it


def pytest_report_header(config: pytest.Config) -> str:
    shared = config.stash.get(_SHARED, "")
    return f"network and /run: the machine's ({shared})" if shared else ""


@pytest.hookimpl(trylast=True)  # its processes have ended
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    own = session.config.stash.get(_OWN_FOLDER, None)
    if own is not None:
        own.end(keep=exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED))
    if session.config.option.logs_in:
        session.config.option.tbstyle = "no"  # pytest shows none of what goes to the file


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    summary.write(terminalreporter)


def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> None:
    """Close the clients of a test that has failed: what it leaves is not a next one's failure.

    One that passes closes them itself, which is looked at behind it.
    """
    if call.when == "call" and call.excinfo is not None:
        for each in [*Client.known]:
            each.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--once", action="store_true", help="see tests/once.py")
    parser.addoption("--shared-world", action="store_true", help="make none of tests/world.py")
    summary.add_option(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Collector, obj: object) -> list[pytest.Item] | None:
    """Make no items of a costly test that --once leaves out: each process would make them all."""
    return [] if collector.config.getoption("once") and once.is_costly(obj) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long begins first, or one process would be busy with it at the end."""
    if config.getoption("once"):
        keep = once.chosen(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in keep])
        items[:] = once.mixed(item for item in items if item in keep)
    else:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """From here on only what tests make is looked at for garbage."""
    gc.freeze()
    gc.enable()
