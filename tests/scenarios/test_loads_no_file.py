"""Once its loop runs, a protector opens no file of Python code, whatever it is asked to do.

An audit hook in each of its programs notes the files that the interpreter opens to import, while
the loop runs and after it.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from socketprotector.model.control_requests import COMMANDS
from tests.rounds import rounds
from tests.scenarios.adopting import Installation, at_rest, kill_protector, revived
from tests.scenarios.config_file import File
from tests.scenarios.operating import MANY, Line, Operated
from tests.scenarios.probed import Asked, get

pytestmark = pytest.mark.timeout(rounds(120, 600))

#: The script of a release, which notes such files in another one.  "import" has the path of
#: an extension module.
NOTES = """
def note(event, arguments):
    path = arguments[0 if event == "open" else 1] if event in ("open", "import") else None
    if not str(path).endswith((".py", ".pyc", ".so")):
        return
    frame, names = sys._getframe(), set()
    while frame:
        code, frame = frame.f_code, frame.f_back
        names.add(os.path.basename(code.co_filename) + ":" + code.co_name)
    if names & {"loop.py:run", "assembly.py:finish"}:
        with open(FILE, "a") as file:
            print(path, *names, file=file)
sys.addaudithook(note)
from socketprotector.__main__ import main
main()
"""


class Noted:
    """A release of the protector that notes which files of code it opens once its loop runs."""

    def __init__(self, installation: Installation, file: Path) -> None:
        self.installation, self._file = installation, file
        file.touch()
        installation.script("one", NOTES.replace("FILE", repr(str(file))))

    @property
    def found(self) -> list[str]:
        return self._file.read_text().splitlines()


@pytest.fixture
def noted(installation: Installation, tmp_path: Path) -> Noted:
    return Noted(installation, tmp_path / "opened")


#: Arguments of the commands that need some.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "scale": {"by": 1},
    "hold": {"seconds": 60},
    "log-level": {"level": "info"},
    "lame-duck": {"on": False},
}


def test_a_file_that_is_opened_late_is_noted(noted: Noted, place: Path) -> None:
    """What the other tests rely on."""
    module = "daemon/control/commands"
    noted.installation.change("one", module, "(?=\nimport)", "\nimport this_is_late")
    folder = noted.installation.folder / "one"
    (folder / "this_is_late.py").touch()
    daemon = noted.installation.start("--control", place, "127.0.0.1:0", "--", *MANY).ready()
    with Line(place) as line:
        line.status()
    daemon.stop()

    assert f"{folder}/this_is_late.py" in {each.split()[0] for each in noted.found}


PROBES = (
    *("--ready", "http:/healthz", "--health", "http:/healthz", "--health-every", "0.1s"),
    *("--settle", "0.2s", "--settle-check", "http:/healthz", "--log-prefix"),
)


@pytest.mark.parametrize(
    ("handoff", "options"),
    [("connection", ()), ("connection", PROBES), ("listener", PROBES)],
    ids=["defaults", "connection", "listener"],
    indirect=["handoff"],
)
@pytest.mark.costly
def test_no_file_of_code_is_opened_once_the_loop_runs(
    noted: Noted, place: Path, asked: Asked, tmp_path: Path, options: Sequence[str]
) -> None:
    file = File(tmp_path / "config.toml")
    file.command = (str(asked.release.path),)
    file.says()
    words = ("--guard", *options, "--config", str(file.path), "--control", str(place))
    daemon = noted.installation.start(*words).ready()
    one = Operated(daemon, place)

    def exercise(generation: int) -> None:
        """Hold, reload, fail, try a dry run, and send each command that starts no program."""
        mark = len(daemon.log.seen)
        with Line(place) as line:
            line.ask("hold", seconds=60)
            line.ask("reload")
            daemon.log.wait_for(rf"event=reloaded generation={generation}\b", after=mark)
            line.ask("release")
            if options:
                daemon.log.wait_for(rf"event=healthy generation={generation}\b", after=mark)
            line.ask("reload", dry_run=True)
            daemon.log.wait_for("event=dry-run-passed", after=mark)
            asked.release.becomes("sh", "-c", "echo no such table >&2; exit 7")
            line.ask("reload")
            daemon.log.wait_for("event=reload-failed", after=mark)
            asked.becomes()
            [process, *_] = one.pids(generation)
            for command in sorted({*COMMANDS} - {"hold", "reload", "stop", "upgrade"}):
                line.send(command, **{**ARGUMENTS, "replace": {"pid": process}}.get(command, {}))
                line.answer()
        assert get(one.address[1])
        at_rest(daemon)

    exercise(2)
    file.says("workers = -1")
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=reload-failed", after=mark)
    file.says()
    revived(daemon, kill_protector(daemon))
    exercise(6)
    daemon.stop()

    assert noted.found == []
