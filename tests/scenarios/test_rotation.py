"""Rotation of the log file by the real logrotate, as the shipped configuration has it done."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import pytest

from tests import needs
from tests.running import DEADLINE_S, ROOT, Client
from tests.scenarios.starting import Start
from tests.scenarios.tools import worker

SHIPPED = ROOT / "init.d" / "socketprotector.logrotate"
#: Prints what it is told to, one line for each line.
TALKS = worker("talks")


class Logrotate:
    """logrotate(8), with the shipped file but for the folder that the logs are in."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("logrotate", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            needs.skip("logrotate")
        self._program = program
        self.logs = folder / "logs.sh"
        self.logs.mkdir(mode=0o755)
        self._state = folder / "state.sh"
        self._file = folder / "logrotate.sh"
        shipped = SHIPPED.read_text()
        assert "/var/log/socketprotector/" in shipped
        self._file.write_text(shipped.replace("/var/log/socketprotector", str(self.logs)))
        self._file.chmod(0o644)

    def __call__(self) -> str:
        """Rotate now, whatever the date; return what it said."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            [self._program, "--force", "--state", str(self._state), str(self._file)],
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def read(self, name: str) -> str:
        path = self.logs / name
        return (
            gzip.decompress(path.read_bytes()).decode()
            if name.endswith(".gz")
            else path.read_text()
        )


@pytest.fixture
def logrotate(start: Start) -> Logrotate:
    found = Logrotate(start.folder)
    start.log_file = found.logs / "web.log"
    return found


ROTATIONS = 3


@pytest.mark.parametrize("options", [(), ("--guard",)], ids=["alone", "guarded"])
@pytest.mark.costly
def test_each_line_is_in_one_of_the_files_in_its_order(
    start: Start, logrotate: Logrotate, options: tuple[str, ...]
) -> None:
    start.up("--name", "web", *options, "unix:s", "--", *TALKS)
    (logrotate.logs / "gone.log").write_text("of an instance that does not run\n")
    said, done = 0, Event()

    with Client(f"{start.folder}/s") as client:

        def talk() -> None:
            nonlocal said
            while not done.is_set():
                assert client.ask(f"line {said}") == f"line {said}"
                said += 1

        talking = Thread(target=talk)
        talking.start()
        try:
            for _ in range(ROTATIONS):
                start.wait_for("(?m)^line ")
                logrotate()
                start.wait_for("event=reopened")
        finally:
            done.set()
            talking.join()
        start.wait_for(f"(?m)^line {said - 1}$")
        start.reload()
    start.stop()

    files = ["web.log", "web.log.1", *(f"web.log.{n}.gz" for n in range(2, ROTATIONS + 1))]
    found = "".join(logrotate.read(name) for name in reversed(files))
    assert re.findall(r"(?m)^line (\d+)$", found) == [str(number) for number in range(said)]
    assert "event=start " in logrotate.read(files[-1])
    assert "event=stopped" in logrotate.read("web.log")
    assert start.log_file.stat().st_mode & 0o777 == 0o640


def test_after_a_rotation_no_process_writes_to_the_old_file(
    start: Start, logrotate: Logrotate
) -> None:
    """Worker, protector, guard, and the protector that the guard starts when that one is killed."""
    start.up("--name", "web", "--guard", "unix:s", "--", *TALKS)
    (protector,) = re.findall(r"event=start pid=(\d+)", start.log)
    with Client(f"{start.folder}/s") as client:
        logrotate()
        start.wait_for("event=reopened")
        before = logrotate.read("web.log.1")
        client.say("from a worker of before")
        start.wait_for("(?m)^from a worker of before$")

        os.kill(int(protector), signal.SIGKILL)
        start.wait_for("event=protector-died")  # the guard's word
        start.wait_for("event=resumed")
    start.reload()
    with Client(f"{start.folder}/s", "from a new worker"):
        start.wait_for("(?m)^from a new worker$")
    start.stop()

    start.wait_for("event=stopped")
    assert logrotate.read("web.log.1") == before
