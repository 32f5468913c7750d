"""A worker of the protector's user against the launching process, which is root."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from socketprotector.launch.await_verdict import file_identity
from tests import needs
from tests.scenarios.users import A, Command

pytestmark = [needs.ANOTHER_USER, pytest.mark.timeout(120)]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    made = tmp_path / "victim"
    made.write_text("precious")
    made.chmod(0o600)
    return made


@pytest.mark.parametrize("then", ["kill", "flood", "hang-up"])
@pytest.mark.parametrize("what", ["made", "pid", "failed", "waits"])
def test_a_lie_on_its_connection_removes_no_file_and_does_not_delay_it(
    command: Command, victim: Path, what: str, then: str
) -> None:
    lies = {
        "made": {"made": {str(victim): file_identity(victim.lstat())}},
        "pid": {"pid": 1},
        "failed": {"failed": "\x1b[2J", "status": 0},
        "waits": {"waits_for": [{"kind": "", "generation": 1e999, "reason": "", "left_s": 1e999}]},
    }
    # Python writes Infinity, but a float may also be too large.
    lie = json.dumps(lies[what]).replace("Infinity", "1e999") + "\n"
    liar = command.worker("takes_launcher", then, lie)

    ended = command.run("--user", A, "unix:s", "--", *liar)

    assert ended.status == 111
    assert "\x1b" not in ended.err
    assert victim.read_text() == "precious"
    assert command.start.left() == [], "what this start had made is removed"


def test_half_a_message_of_another_process_spoils_no_message_of_the_protector(
    command: Command,
) -> None:
    command.up("--user", A, "unix:s", "--", *command.worker("takes_launcher", "ready", "{"))

    command.start.stop(signal.SIGINT)
    assert command.start.left() == []
