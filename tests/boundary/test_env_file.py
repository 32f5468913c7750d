"""Environment files."""

from __future__ import annotations

import os
import pty
import socket
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from socketprotector.model.settings import Settings
from socketprotector.system import env_file
from socketprotector.system.program_spec import env_file_of
from tests.together import together


def test_lines_are_assignments() -> None:
    text = (
        "A=1\n\n# comment\n; comment too\n  B = two words \nexport C='single # quoted'\n"
        "D=\"double\"\nE=\nF=a=b\n_9=x\nA=2\nG='\"'\nH=it's\n"
    )

    assert env_file.parse(text, "file") == {
        "A": "2",
        "B": "two words",
        "C": "single # quoted",
        "D": "double",
        "E": "",
        "F": "a=b",
        "_9": "x",
        "G": '"',
        "H": "it's",
    }


def test_only_a_line_feed_or_a_carriage_return_ends_a_line() -> None:
    for end in ("\n", "\r", "\r\n"):
        assert env_file.parse(f"A=1{end}B=2{end}", "file") == {"A": "1", "B": "2"}, f"{end!a}"
    values = {each: f"a{each}B=1" for each in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"}

    for character, value in values.items():
        assert env_file.parse(f"A={value}\r\nC=2\r\n", "file") == {"A": value, "C": "2"}, (
            f"{character!a}"
        )


def test_a_value_ends_with_any_other_character_than_a_blank() -> None:
    for character in "\v\f\x1c\x85\xa0\u2028\u3000":
        value = f"{character}a{character}"
        assert env_file.parse(f"A= {value} \t\r\n", "file") == {"A": value}, f"{character!a}"


@together("line", ["A", "=1", "9A=1", "A B=1", "A='x", 'A="', "A='x\"", "\u00e4=1"])
def test_a_mistake_is_reported_with_its_line(line: str) -> None:
    with pytest.raises(ValueError, match=r"^file line 2: "):
        env_file.parse(f"GOOD=1\n{line}\n", "file")


def test_a_nul_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"^file line 1: "):
        env_file.parse("A=\0\n", "file")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
def test_bytes_that_are_no_text_are_passed_on(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "env"
    path.write_bytes(mark + b"A=\xff\n")

    assert os.fsencode(env_file_of(Settings("x", ("w",), "/", env_file=str(path)))["A"]) == b"\xff"


@together("kind", ["FIFO", "socket", "terminal", "master", "zero", "folder"])
def test_what_cannot_be_read_again_is_refused_unopened(kind: str) -> None:
    with TemporaryDirectory() as folder, ExitStack() as opened:
        path = Path(folder, "env")
        error: type[Exception] = ValueError
        said = f"{path}: no regular file, but .*; name a regular file"
        if kind == "FIFO":
            os.mkfifo(path)
            said = f"{path}: a FIFO, but it is read again later"
        elif kind == "socket":
            opened.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        elif kind == "folder":
            path.mkdir()
            error, said = IsADirectoryError, "Is a directory"
        else:
            ours, theirs = pty.openpty()
            opened.callback(os.close, ours)
            opened.callback(os.close, theirs)
            devices = {"terminal": os.ttyname(theirs), "master": "/dev/ptmx", "zero": "/dev/zero"}
            path.symlink_to(devices[kind])

        with pytest.raises(error, match=said) as caught:
            env_file.contents(str(path))

        if isinstance(caught.value, OSError):
            assert caught.value.filename == str(path)


def test_the_null_device_is_an_empty_file() -> None:
    assert env_file.contents(os.devnull) == b""
