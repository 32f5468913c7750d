"""The log: one line for each call, never blocking, never raising."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from socketprotector.daemon.control import status
from socketprotector.daemon.log_output import Output
from socketprotector.model.log_format import is_own
from socketprotector.model.settings import Settings
from socketprotector.system.log import Log
from tests.running import DEADLINE_S
from tests.together import together


@contextmanager
def stderr_is(fd: int) -> Iterator[None]:
    """Let descriptor 2 be another one for a while."""
    kept = os.dup(2)
    os.dup2(fd, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def log_to(fd: int, level: str = "info", **more: Any) -> Iterator[Log]:
    with stderr_is(fd):
        log = Log(level, **more)
        try:
            yield log
        finally:
            log.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    receive, send = os.pipe()
    yield receive, send
    os.close(receive)
    os.close(send)


def test_a_line_is_time_level_and_fields(pipe: tuple[int, int]) -> None:
    receive, send = pipe
    with log_to(send) as log:
        log.write("info", "ready", generation=1, name="two words", left_out=None, odd='a"b=\n\x1b')

    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info event=ready generation=1 "
        r'name="two words" odd="a\\"b=\\n\\x1b"\n',
        os.read(receive, 4096).decode(),
    )


def test_a_reader_that_adds_the_time_gets_a_priority(pipe: tuple[int, int]) -> None:
    receive, send = pipe
    with log_to(send, "debug", prioritized=True) as log:
        for level in ("debug", "info", "warning", "error"):
            log.write(level, "told")

    assert os.read(receive, 4096) == b"<7>event=told\n<6>event=told\n<4>event=told\n<3>event=told\n"


def test_what_is_below_the_threshold_is_not_written(pipe: tuple[int, int]) -> None:
    receive, send = pipe
    with log_to(send, "warning", prioritized=True) as log:
        log.write("info", "quiet")
        log.write("error", "loud")

    assert os.read(receive, 4096) == b"<3>event=loud\n"


def test_lines_that_would_block_are_dropped_and_counted(pipe: tuple[int, int]) -> None:
    receive, send = pipe
    with log_to(send, prioritized=True) as log:
        for _ in range(10_000):
            log.write("info", "many", padding="x" * 50)
        lost = f"lines are lost: the last {log.dropped} could not be written to the log"
        assert lost in status.of_log(log, None)
        while len(os.read(receive, 1 << 20)) == 1 << 20:
            pass
        log.write("info", "first")
        log.write("info", "second")
        first, second = os.read(receive, 4096).decode().splitlines()[-2:]

    assert re.fullmatch(r"<6>event=first dropped_lines=\d+", first)
    assert second == "<6>event=second"
    assert log.dropped == 0
    assert os.get_blocking(send), "the workers' description is as it was"


def test_a_pipe_that_may_not_be_opened_again_does_not_block_either(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user's: it is written to by the description that all share."""
    receive, send = pipe

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr("socketprotector.system.log.os.open", refuse)
    with log_to(send) as log:
        monkeypatch.undo()
        for _ in range(2000):
            log.write("info", "x" * 100)
        while len(os.read(receive, 65536)) == 65536:
            pass
        log.write("info", "last")

    assert b"event=last dropped_lines=" in os.read(receive, 65536)
    assert os.get_blocking(send)


def test_a_reader_that_is_gone_is_no_trouble() -> None:
    receive, send = os.pipe()
    with log_to(send) as log:
        os.close(receive)
        log.write("info", "unread")
        log.reopen()
        log.write("info", "unread")
    os.close(send)


def test_a_socket_is_written_to_without_blocking() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, log_to(theirs.fileno(), prioritized=True) as log:
        for _ in range(20_000):
            log.write("info", "many", padding="x" * 50)
        assert ours.recv(4096).startswith(b"<6>event=many")
        assert theirs.getblocking()


def test_a_rotation_takes_no_new_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(fd: int) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with (
        (tmp_path / "old").open("wb") as old,
        (tmp_path / "new").open("wb") as new,
        log_to(old.fileno()) as log,
    ):
        os.dup2(new.fileno(), 2)
        monkeypatch.setattr(os, "dup", no_memory)
        log.reopen()
        log.write("info", "reopened")
        monkeypatch.undo()

    assert (tmp_path / "old").read_bytes() == b""
    assert b"event=reopened" in (tmp_path / "new").read_bytes()


def test_lines_in_a_file_keep_step_with_other_writers(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    with log_to(fd, prioritized=True) as log:
        log.write("info", "one")
        os.write(2, b"a worker's\n")
        log.write("info", "two")
    os.close(fd)

    assert (tmp_path / "log").read_text() == "<6>event=one\na worker's\n<6>event=two\n"


def test_a_terminal_is_written_to(pipe: tuple[int, int]) -> None:
    ours, theirs = pty.openpty()
    with log_to(theirs, prioritized=True) as log:
        log.write("info", "shown")
        assert os.read(ours, 4096) == b"<6>event=shown\r\n"
    os.close(theirs)
    os.close(ours)


def test_observers_get_lines_from_info_on_whatever_is_written(pipe: tuple[int, int]) -> None:
    receive, send = pipe
    told: list[tuple[str, str, dict[str, object]]] = []
    with log_to(send, "error", prioritized=True) as log:
        log.observe(lambda level, event, fields: told.append((level, event, dict(fields))))
        log.write("debug", "decided", about=1)
        log.write("info", "exited", worker=2, how="was killed", left_out=None, odd=Path("/x"))
        log.write("error", "broken", text="a\nb")

    assert told == [
        ("info", "exited", {"worker": 2, "how": "was killed", "odd": "/x"}),
        ("error", "broken", {"text": "a\nb"}),
    ]
    assert os.read(receive, 4096) == b'<3>event=broken text="a\\nb"\n'


def test_the_level_can_be_changed(pipe: tuple[int, int]) -> None:
    receive, send = pipe
    with log_to(send, prioritized=True) as log:
        log.write("debug", "one")
        log.set_level("debug")
        log.write("debug", "two")
        with pytest.raises(KeyError):
            log.set_level("loud")

    assert log.level == "debug"
    assert os.read(receive, 4096) == b"<7>event=two\n"


def test_a_json_line_is_one_object(pipe: tuple[int, int]) -> None:
    receive, send = pipe
    with log_to(send, form="json") as log:
        log.write(
            "warning", "exited", worker=2, how='a"b\n\u2028\udcff', left_out=None, odd=Path("/x")
        )

    line = os.read(receive, 4096).decode("ascii")
    assert line.endswith("}\n")
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "warning",
        "event": "exited",
        "worker": 2,
        "how": 'a"b\n\u2028\udcff',
        "odd": "/x",
    }
    assert is_own(line)


def test_a_json_line_has_a_priority_where_one_is_wanted(pipe: tuple[int, int]) -> None:
    receive, send = pipe
    with log_to(send, form="json", prioritized=True) as log:
        log.write("error", "broken")

    line = os.read(receive, 4096).decode()
    assert line.startswith('<3>{"time": "')
    assert is_own(line)


def shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    try:
        with log_to(theirs) as log:
            log.write("error", "broken", generation=2)
            return os.read(ours, 4096).decode()
    finally:
        os.close(theirs)
        os.close(ours)


def test_a_terminal_has_colour_and_the_words_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    line = shown_on_a_terminal(monkeypatch)

    assert " \x1b[1;31merror\x1b[0m event=broken generation=2\r\n" in line


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_without_colour_if_the_user_wants_none(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    assert "\x1b" not in shown_on_a_terminal(monkeypatch, **environment)


@together(
    ("line", "own"),
    [
        ("2026-01-02T03:04:05.678Z info event=ready generation=1", True),
        ("<6>event=ready", True),
        ("<3>disk full", False),
        ("no newline2026-01-02T03:04:05.678Z info event=exited worker=1", False),
        ("2026-01-02T03:04:05.678Z info request served event=click", False),
        ("my daemon says event=start", False),
        ('{"time": "2026-01-02T03:04:05.678Z", "level": "info", "event": "ready"}', True),
        ('{"time": "2026-01-02T03:04:05.678Z", "message": "mine"}', False),
        ("", False),
    ],
)
def test_its_own_lines_can_be_told_from_those_of_workers(line: str, own: bool) -> None:
    assert is_own(line) is own


# -- the end of the log file, as a failed worker's last words ---------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of --log-file."""
    path = tmp_path / "log"
    path.write_text("before\nno such table\n")
    return path


def last_words(fd: int, path: Path, start: int = len("before\n")) -> list[str]:
    """Return what is known of a worker without a pipe of its own; fd: our stderr."""
    said: list[str] = []
    with stderr_is(fd):
        output = Output(Settings("web", ("x",), "/", log_file=str(path), log_relay=False))
        output.last_words(1, start, said.append)
    return said


def test_last_words_are_what_was_written_since_the_workers_start(file: Path) -> None:
    with file.open() as log:
        assert last_words(log.fileno(), file) == ["no such table"]
        assert last_words(log.fileno(), file, -1) == [""]


def test_a_last_line_without_an_end_is_among_the_last_words(file: Path) -> None:
    with file.open("a") as log:
        log.write("no such row2026-01-02T03:04:05.678Z info event=exited worker=1\n")
        log.write("2026-01-02T03:04:05.679Z info event=drained generation=1\n")
        log.flush()
        found = last_words(log.fileno(), file)[0].splitlines()

    assert [line[:11] for line in found] == ["no such tab", "no such row"]


def test_last_words_are_not_read_from_another_file_of_that_name(file: Path) -> None:
    with file.open() as log:
        file.rename(file.with_name("log.1"))
        file.write_text("before\nprivate\n")

        assert last_words(log.fileno(), file) == [""]


def test_a_fifo_in_the_place_of_the_log_file_is_not_waited_for(file: Path) -> None:
    """Without a writer, its open() could block for ever."""
    said: list[str] = []
    with file.open() as log:
        file.unlink()
        os.mkfifo(file)
        fd = log.fileno()
        thread = threading.Thread(target=lambda: said.extend(last_words(fd, file)))
        thread.start()
        thread.join(DEADLINE_S)
        returned = not thread.is_alive()
        os.close(os.open(file, os.O_RDWR))  # ends the wait
        thread.join()

    assert (returned, said) == (True, [""])
