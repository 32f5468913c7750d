"""Inherited fds: descriptors that are left for the next program, and what it finds."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from socketprotector.programs import guard
from socketprotector.system import inherited
from socketprotector.system.inherited import Inherited
from tests import needs
from tests.running import ROOT

SHOW = (
    "import json, os; from socketprotector.system import inherited; found = inherited.receive();"
    "print(json.dumps({'found': {n: os.readlink(f'/proc/self/fd/{f}') for n, f in found.items()},"
    "'inherits': [n for n, f in found.items() if os.get_inheritable(f)],"
    "'open': sorted(os.readlink(f'/proc/self/fd/{f}') for f in os.listdir('/proc/self/fd')"
    " if int(f) > 2 and os.path.lexists(f'/proc/self/fd/{f}')),"
    "'left': [v for v in os.environ if v.startswith('LISTEN')]}))"
)


@pytest.fixture
def files() -> Iterator[dict[str, int]]:
    made = {name: os.memfd_create(name) for name in ("sp.a", "sp.b", "sp.c")}
    yield made
    for fd in made.values():
        os.close(fd)


def shown(
    leave: str,
    files: dict[str, int] | str,
    *through: str,
    status: int = 0,
    **instead: str,
) -> dict[str, object]:
    """Have a process leave descriptors and execute another, which says what it finds.

    files: the descriptors, or the code that makes them.  through: a command that executes it.
    instead: other values of variables.
    """
    code = (
        "import os, sys\n"
        "from socketprotector.system import inherited\n"
        f"files = {files!s}\n"
        f"with {leave} as variables:\n"
        "    os.execve(sys.argv[2], [*sys.argv[2:], '-c', sys.argv[1]],"
        f"{{**os.environ, **variables, **{instead}}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, SHOW, *through, sys.executable],
        pass_fds=() if isinstance(files, str) else list(files.values()),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def memfd(*names: str) -> dict[str, str]:
    return {name: f"/memfd:{name} (deleted)" for name in names}


LEAVE = "inherited.kept_through_exec(files)"


def told(given: dict[str, int], *names: str) -> list[str]:
    """Names of descriptors by their numbers, from 3 on, with gaps."""
    by_number = dict(zip(given.values(), names, strict=True))
    return [by_number.get(fd, inherited.UNUSED) for fd in range(3, max(by_number) + 1)]


def test_what_is_left_is_found_by_name_and_goes_no_further(files: dict[str, int]) -> None:
    seen = shown(LEAVE, files)

    assert seen["found"] == memfd("sp.a", "sp.b", "sp.c")
    assert seen["inherits"] == []
    assert seen["left"] == []


def test_the_order_of_the_numbers_does_not_matter(files: dict[str, int]) -> None:
    backward = dict(reversed(files.items()))

    assert shown(LEAVE, backward)["found"] == memfd("sp.a", "sp.b", "sp.c")


def test_what_else_was_passed_is_closed_be_it_of_one_name_twice(files: dict[str, int]) -> None:
    given = {"sp.a": files["sp.a"], "web": files["sp.b"], "sp.none": files["sp.c"]}
    seen = shown(LEAVE, given, LISTEN_FDNAMES=":".join(told(given, "sp.a", "web", "web")))

    assert seen["found"] == memfd("sp.a")
    again = shown(LEAVE, given, LISTEN_FDNAMES=":".join(told(given, "sp.a", "sp.a", "web")))
    assert again["found"] == memfd("sp.a")


def test_what_is_for_another_process_is_not_taken(files: dict[str, int]) -> None:
    assert shown(LEAVE, files, LISTEN_PID="1")["found"] == {}
    assert shown(LEAVE, files, LISTEN_FDS="x")["found"] == {}


def test_left_in_place_and_not_executed_nothing_is_inherited(files: dict[str, int]) -> None:
    with inherited.kept_through_exec(files) as variables:
        assert all(os.get_inheritable(fd) for fd in files.values())
        assert int(variables["LISTEN_FDS"]) == max(files.values()) - inherited.FIRST + 1

    assert not any(os.get_inheritable(fd) for fd in files.values())


# --- more names than the environment takes ----------------------------------------

#: As many as 2,500 workers have, more than 128 KiB of names.
MANY = [f"sp.worker.{n}.{what}" for n in range(2500) for what in ("process", "notify", "line")]
LIMIT = "__import__('resource').setrlimit(7, (16000, 16000))"
MAKE_MANY = (
    f"{LIMIT} or "
    "{f'sp.worker.{n}.{what}':"
    " os.memfd_create(f'sp.worker.{n}.{what}')"
    " for n in range(2500) for what in ('process', 'notify', 'line')}"
)
needs_many = needs.unless(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 16_000, "a limit of 16,000 descriptors"
)


@needs_many
@pytest.mark.costly
def test_thousands_of_names_go_through() -> None:
    seen = shown(LEAVE, MAKE_MANY)

    assert seen["found"] == memfd(*MANY)
    assert seen["inherits"] == []
    assert seen["left"] == []
    assert seen["open"] == sorted(memfd(*MANY).values())  # the list itself is closed


@needs_many
def test_a_gap_among_thousands_is_left_out() -> None:
    holed = f"(lambda files: (os.close(files.pop('sp.worker.0.line')), files)[1])({MAKE_MANY})"
    seen = shown(LEAVE, holed)

    assert seen["found"] == memfd(*(name for name in MANY if name != "sp.worker.0.line"))


@needs_many
def test_names_fit_into_an_environment_that_is_almost_full() -> None:
    """With so small a stack limit, all strings together have 128 KiB."""
    small = "__import__('resource').setrlimit(3, (512 * 1024, 512 * 1024))"
    make = "{f'sp.worker.{n}.line': os.memfd_create(f'sp.worker.{n}.line') for n in range(2000)}"

    seen = shown(LEAVE, f"{small} or {LIMIT} or {make}", BIG="x" * 90_000)

    assert seen["found"] == memfd(*(f"sp.worker.{n}.line" for n in range(2000)))


@needs_many
def test_thousands_of_names_go_through_the_guard() -> None:
    """It inherits them, and leaves them to the protector as inherited fds."""
    through = (sys.executable, "-I", "-S", guard.__file__)
    # A protector that ends before it has accepted is the end of the guard.
    seen = shown(LEAVE, MAKE_MANY, *through, status=guard.FAILED)

    found = seen["found"]
    assert isinstance(found, dict)
    assert found.pop(inherited.GUARD).startswith("socket:")
    assert found == memfd(*MANY)
    assert seen["inherits"] == []


def test_thousands_of_names_left_and_not_executed_leave_nothing(
    files: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inherited, "NAMES_BYTES", 10)
    before = os.listdir("/proc/self/fd")

    with inherited.kept_through_exec(files) as variables:
        assert variables["LISTEN_FDNAMES"].startswith(inherited.NAMES)
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1

    assert os.listdir("/proc/self/fd") == before


def test_names_are_grouped_by_what_they_are_about() -> None:
    given = {"sp.channel.1.read": 5, "sp.channel.1.write": 6, "sp.channel.12.read": 7, "sp.x": 8}

    assert Inherited(given).take_all(inherited.GENERATION) == {
        "1": {"read": 5, "write": 6},
        "12": {"read": 7},
    }


def test_each_is_given_to_one_owner_and_the_rest_is_closed() -> None:
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    names = ("sp.state", "sp.worker.1.process", "sp.worker.1.line", "sp.hand.7", "sp.relay.read")
    left = Inherited(dict(zip(names, fds, strict=True)))

    assert left.has(inherited.WORKER, 1, "line")
    assert left.take(inherited.WORKER, 1) == {"process": fds[1], "line": fds[2]}
    assert left.take(inherited.WORKER, 1) == {}
    assert left.take_all(inherited.WORKER) == {}
    assert left.take_one("sp.hand.7") == fds[3]
    assert left.take_one("sp.hand.7") is None
    assert left.take_all(inherited.HAND) == {}
    left.close()

    assert _is_open(fds[1])
    assert not _is_open(fds[0])
    assert not _is_open(fds[4])
    for fd in fds[1:4]:
        os.close(fd)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
