"""The files of a generation's program: its name, and whether one has changed since its start."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from socketprotector.model.records import Program
from socketprotector.system.program_spec import changed_file, name_of

BEFORE = 0.0  # the file has changed since


@pytest.fixture
def program(tmp_path: Path) -> Program:
    (tmp_path / "app.py").write_text("")
    (tmp_path / "data").write_text("")
    return Program("/bin/true", ("python3", "-u", "app.py", "data"), str(tmp_path), (), 0o22, (), 0)


def since_now(program: Program) -> float:
    return max(os.stat(each).st_ctime for each in Path(program.directory).iterdir())


@pytest.mark.parametrize(
    ("argv", "handoff"),
    [
        (("python3", "-u", "app.py", "data"), "connection"),
        (("python3", "app.py"), "listener"),
        (("adapter", "--file", "/gone", "--", "python3", "./app.py"), "stdio"),
        (("adapter", "--shell", "--", "exec python3 -u app.py data"), "stdio"),
    ],
)
def test_the_script_of_an_interpreter(
    program: Program, argv: tuple[str, ...], handoff: str
) -> None:
    program = replace(program, argv=argv, handoff=handoff, path="/gone")
    assert os.path.realpath(changed_file(program, BEFORE)) == f"{program.directory}/app.py"
    assert changed_file(program, since_now(program)) == ""


def test_the_executable_itself(program: Program) -> None:
    path = f"{program.directory}/data"
    assert changed_file(replace(program, path=path, argv=("./data",)), BEFORE) == path
    pooled = replace(program, argv=("adapter", "--file", path, "--", "data"), handoff="stdio")
    assert changed_file(pooled, BEFORE) == path


@pytest.mark.parametrize("written", ["access.log", "server.pid"])
def test_a_file_that_the_program_writes_is_not_its_script(program: Program, written: str) -> None:
    (Path(program.directory) / written).touch()
    argv = ("server", "--to", written, "app.py")
    found = changed_file(replace(program, argv=argv, path="/gone"), BEFORE)
    assert found == f"{program.directory}/app.py"


def test_what_is_no_file_of_it(program: Program) -> None:
    argv = ("/gone", "--config=app.py", "-c", "app:main", "nul\0")
    assert changed_file(replace(program, path="/gone", argv=argv), BEFORE) == ""


@pytest.mark.parametrize(
    ("argv", "handoff", "name"),
    [
        (("./daemon", "4321"), "connection", "./daemon"),
        (("adapter", "--", "/srv/daemon", "--"), "legacy", "/srv/daemon"),
        (("adapter", "--file", "/bin/cat", "--", "cat"), "stdio", "cat"),
        (("adapter", "--shell", "--", "PASSWORD=secret exec cat"), "stdio", "sh"),
        (("adapter", "of", "an", "older", "protector"), "stdio", "adapter"),
    ],
)
def test_its_name_is_the_first_word_of_its_command_but_of_no_shell(
    program: Program, argv: tuple[str, ...], handoff: str, name: str
) -> None:
    assert name_of(replace(program, argv=argv, handoff=handoff)) == name
