"""No secret in argv, logs or status; and environments are closed to other users."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.procfs import command_line_of, descriptors, running
from tests.running import DEADLINE_S, MARK, eventually, marked
from tests.scenarios.managers import Manager
from tests.scenarios.operating import Line
from tests.scenarios.starting import Start
from tests.scenarios.tools import Release, worker

SECRETS = {
    "option": "secret-of-an-option",
    "file": "secret-of-a-file",
    "caller": "secret-of-caller",
}
ARGUMENT = "secret-of-an-argument"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify.sh"))
    yield manager
    manager.close()


class Watched:
    """A guarded, detached protector with a relay's place taken by a log at debug level."""

    def __init__(self, start: Start, manager: Manager) -> None:
        self.start, self.manager = start, manager
        self.file = start.folder / "env.sh"
        self.file.write_text(f"FROM_FILE={SECRETS['file']}\n")
        self.release = Release(start.folder / "daemon.sh")
        self.release.becomes(*worker("tells"))
        self.heard: list[str] = []
        self.shown: set[str] = set()
        self.answered = ""  # on the control socket

    def up(self) -> None:
        self.start.up(
            *("-v", "--guard", "--env", f"FROM_OPTION={SECRETS['option']}"),
            *("--env-file", str(self.file)),
            *("unix:s", "--", str(self.release.path), ARGUMENT),
            environment={"FROM_CALLER": SECRETS["caller"], "NOTIFY_SOCKET": self.manager.address},
        )

    def look(self) -> None:
        """Take in what is shown of every process there is, and what was said to the manager."""
        for pid in marked(self.start.environment[MARK]):
            for name in ("cmdline", "comm", "status"):
                try:
                    self.shown.add(Path(f"/proc/{pid}/{name}").read_text())
                except OSError:
                    continue
        self.heard += [str(fields) for fields in self.manager.rest()]
        for path in Path(os.environ["XDG_RUNTIME_DIR"]).glob("socketprotector/*.control"):
            with Line(path) as line:
                for command in ("status", "history", "crashes", "connections"):
                    self.answered += json.dumps(line.ask(command))

    def texts(self) -> str:
        return "\n".join([self.start.log, self.answered, *self.heard, *self.shown])


def test_neither_argv_nor_log_nor_status_holds_a_secret(start: Start, manager: Manager) -> None:
    watched = Watched(start, manager)
    watched.up()
    watched.look()
    start.reload()
    watched.look()
    start.send(signal.SIGUSR2)
    start.wait_for("event=resumed")
    watched.look()
    # What fails says why, and quotes no value.
    watched.file.write_text(f"FROM_FILE={SECRETS['file']}\nno assignment {SECRETS['file']}\n")
    start.send(signal.SIGHUP)
    start.wait_for("event=reload-failed")
    watched.look()
    watched.file.write_text(f"FROM_FILE={SECRETS['file']}\n")
    watched.release.write("#!/no/such/interpreter\n")
    start.send(signal.SIGHUP)
    eventually(lambda: start.log.count("event=reload-failed") == 2, "another failure")
    watched.look()
    start.stop()
    watched.look()

    assert "reload failed" in watched.texts(), "what was looked at is what was said"
    for secret in SECRETS.values():
        assert secret not in watched.texts()
    assert '"reloads"' in watched.answered
    assert ARGUMENT not in watched.answered + watched.start.log + "".join(watched.heard)


def test_neither_the_probe_nor_the_relay_gets_a_secret_by_its_command_line(
    start: Start, tmp_path: Path
) -> None:
    """Both run too shortly, or too quietly, to be looked at for sure: so their words are."""
    words = ("--env", f"FROM_OPTION={SECRETS['option']}", "unix:s", "--", *worker("tells"))
    assert start(*words).status == 0

    relays = [*map(command_line_of, running("log_relay.py", marked(start.environment[MARK])))]

    assert len(relays) == 1
    assert SECRETS["option"] not in relays[0]
    start.stop()


@needs.ANOTHER_USER
def test_no_other_user_can_read_the_environments(
    start: Start, may: Callable[[str, str], bool]
) -> None:
    """They are in the memory of the processes, their /proc/PID/environ, and two memfds."""
    start.up("--env", "A=1", "unix:s", "--", *worker("minimal"))
    pid = start.pid

    held = {target: fd for fd, target in descriptors(pid).items()}
    memfds = [fd for target, fd in held.items() if target.startswith("/memfd:sp.")]
    assert len(memfds) >= 2
    for fd in memfds:
        assert not may("nobody", f"/proc/{pid}/fd/{fd}")
    assert not may("nobody", f"/proc/{pid}/environ")
    assert not may("nobody", f"/proc/{pid}/mem")
    start.stop()


@pytest.fixture
def may() -> Callable[[str, str], bool]:
    """Whether a user can read what is at a path."""

    def reads(user: str, path: str) -> bool:
        done = subprocess.run(
            ["/bin/sh", "-c", 'ls "$0" && { [ -d "$0" ] || head -c 1 "$0"; }', path],
            user=user,
            capture_output=True,
            cwd="/",
            timeout=DEADLINE_S,
        )
        return done.returncode == 0

    return reads


def test_what_the_launching_process_shows_is_gone_with_it(start: Start) -> None:
    """Who puts a secret into --env shows it while the command starts, and no longer."""
    start.up("--env", f"A={SECRETS['option']}", "unix:s", "--", *worker("tells"))

    texts = [command_line_of(pid) for pid in marked(start.environment[MARK])]

    assert texts
    assert not [text for text in texts if SECRETS["option"] in text]
    start.stop()
