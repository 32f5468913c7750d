"""The programs in the library's README do what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import socketprotector_client

from tests.channel import PYTHON, Channel
from tests.running import ROOT, eventually

TEXT = (ROOT / "client_lib" / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_program_serves_and_ends(channel: Channel, number: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAMS[number])
    worker = channel.start(PYTHON, program)
    client = channel.connect()

    client.say("hello")
    assert client.hear() == "hello"
    client.close()
    channel.end_channel()

    assert worker.wait() == 0
    assert channel.log.read_text() == ""


def test_a_marked_answer_ends_a_connection_at_a_drain(channel: Channel, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(next(each for each in PROGRAMS if "draining(client)" in each))
    worker = channel.start(PYTHON, program)
    client = channel.connect()
    client.say("one")
    assert client.hear() == "one"

    channel.end_channel()

    def is_the_last() -> bool:
        client.say("two")
        return client.hear() == "last two"

    eventually(is_the_last, "the last answer")
    client.close()
    assert worker.wait() == 0


def test_every_public_name_is_explained() -> None:
    missing = [name for name in socketprotector_client.__all__ if f"`{name}" not in TEXT]

    assert missing == []
