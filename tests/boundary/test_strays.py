"""What a failed worker leaves, and the moments at which a look at /proc misses it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from socketprotector import strays

ADDRESS = "@a-test-of-strays"


@contextmanager
def living(environment: dict[str, str]) -> Iterator[int]:
    """A process that has this environment, from its first moment that matters on."""
    with subprocess.Popen(
        ["/bin/cat"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"!")
        process.stdin.flush()
        assert process.stdout.read(1) == b"!"  # it has been executed
        yield process.pid


def found() -> list[int]:
    pids = []
    for pid, pidfd in strays._carrying(ADDRESS):
        pids.append(pid)
        os.close(pidfd)
    return pids


def test_those_with_the_address_are_found_and_nobody_else() -> None:
    with living({"NOTIFY_SOCKET": ADDRESS}) as ours, living({"NOTIFY_SOCKET": ADDRESS + "x"}):
        assert found() == [ours]
    assert found() == []


def test_the_child_of_one_that_is_about_to_end_is_found_though_the_first_look_came_too_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has no environment any more and is not a zombie yet; here that lasts."""
    real = os.listdir
    looks: list[int] = []

    with living({}) as ending, living({"NOTIFY_SOCKET": ADDRESS}) as child:

        def listdir(path: str) -> list[str]:
            looks.append(ending)
            return [name for name in real(path) if len(looks) > 1 or name != str(child)]

        monkeypatch.setattr(os, "listdir", listdir)
        try:
            assert found() == [child]
        finally:
            monkeypatch.undo()


def test_processes_without_an_environment_are_not_looked_at_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[str] = []
    with living({}) as without:

        def listdir(path: str) -> list[str]:
            looks.append(path)
            return [str(without), str(os.getpid())]  # the machine's others come and go

        monkeypatch.setattr(os, "listdir", listdir)
        assert found() == []
        monkeypatch.undo()

    assert len(looks) == 2
