"""The door: descriptors that are left for the next program, and what it finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from socketprotector import door
from tests.running import ROOT

SHOW = (
    "import json, os; from socketprotector import door; found = door.enter();"
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


def shown(leave: str, files: dict[str, int]) -> dict[str, object]:
    """Have a process leave descriptors and execute another, which says what it finds."""
    code = (
        "import os, sys; from socketprotector import door;"
        f"files = {files!r}; environment = {leave};"
        "os.execve(sys.executable, [sys.executable, '-c', sys.argv[1]],"
        "{**os.environ, **environment})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, SHOW],
        pass_fds=list(files.values()),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def memfd(*names: str) -> dict[str, str]:
    return {name: f"/memfd:{name} (deleted)" for name in names}


@pytest.mark.parametrize("leave", ["door.leave(files)", "door.leave_in_place(files)"])
def test_what_is_left_is_found_by_name_and_goes_no_further(
    leave: str, files: dict[str, int]
) -> None:
    seen = shown(leave, files)

    assert seen["found"] == memfd("sp.a", "sp.b", "sp.c")
    assert seen["inherits"] == []
    assert seen["left"] == []


def test_the_order_of_the_numbers_does_not_matter(files: dict[str, int]) -> None:
    backward = dict(reversed(files.items()))

    assert shown("door.leave(files)", backward)["found"] == memfd("sp.a", "sp.b", "sp.c")


def test_what_else_was_passed_is_closed_be_it_of_one_name_twice(files: dict[str, int]) -> None:
    given = {"sp.a": files["sp.a"], "web": files["sp.b"], "sp.none": files["sp.c"]}
    seen = shown("{**door.leave(files), 'LISTEN_FDNAMES': 'sp.a:web:web'}", given)

    assert seen["found"] == memfd("sp.a")
    again = shown("{**door.leave(files), 'LISTEN_FDNAMES': 'sp.a:sp.a:web'}", given)
    assert again["found"] == memfd("sp.a")


def test_what_is_for_another_process_is_not_taken(files: dict[str, int]) -> None:
    assert shown("{**door.leave(files), 'LISTEN_PID': '1'}", files)["found"] == {}
    assert shown("{**door.leave(files), 'LISTEN_FDS': 'x'}", files)["found"] == {}


def test_left_in_place_and_taken_back_nothing_is_inherited(files: dict[str, int]) -> None:
    door.close_again(files)
    numbers = door.leave_in_place(files)
    assert all(os.get_inheritable(fd) for fd in files.values())
    assert int(numbers["LISTEN_FDS"]) == max(files.values()) - door.FIRST + 1

    door.close_again(files)

    assert not any(os.get_inheritable(fd) for fd in files.values())


def test_names_are_grouped_by_what_they_are_about() -> None:
    given = {"sp.channel.1.read": 5, "sp.channel.1.write": 6, "sp.channel.12.read": 7, "sp.x": 8}

    assert door.under(given, door.CHANNEL) == {
        "1": {"read": 5, "write": 6},
        "12": {"read": 7},
    }
