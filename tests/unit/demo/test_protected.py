"""The protector of the demo, where it does not end."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from socketprotector.demo import cli, protected
from socketprotector.demo.protected import Protected
from socketprotector.system import control_path
from tests.running import DEADLINE_S


class Hanging(Protected):
    """In its place something that heeds no signal but KILL."""

    def __init__(self, folder: Path, name: str) -> None:
        assert folder.is_dir()
        self.folder, self.name = folder, name
        command = ["sh", "-c", "trap '' INT; echo trapped; while :; do sleep 1000; done"]
        self._process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def end(self) -> None:
        try:
            super().end()
        finally:
            assert self._process.stdout is not None
            self._process.stdout.close()
            try:
                statuses.append(self._process.wait(DEADLINE_S))
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)


statuses: list[int] = []


class Told:
    """In the place of the story."""

    def __init__(self, *_: object) -> None:
        pass

    def tell(self) -> bool:
        return True


class NoStops:
    """This process keeps its handlers."""

    def hold(self) -> None:
        pass

    def release(self) -> None:
        pass


def test_one_that_does_not_end_is_killed_and_its_folder_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protected, "_STOP_S", 0.1)
    monkeypatch.setattr(cli, "Protected", Hanging)
    monkeypatch.setattr(cli, "Story", Told)
    monkeypatch.setattr(cli, "_Stops", NoStops)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert cli.main(["--pause", "0"]) == 1

    assert "a program of the demo has not ended within 100ms" in capsys.readouterr().err
    assert statuses == [-signal.SIGKILL]
    assert list(tmp_path.iterdir()) == []


class Makes:
    """In the place of a protector, as root: makes the folder of control sockets."""

    def __init__(self, *_: object) -> None:
        os.makedirs(control_path.SYSTEM, exist_ok=True)

    def end(self) -> None:
        pass

    def said(self, _: int) -> list[str]:
        return []


@pytest.mark.parametrize(("before", "other"), [(False, ""), (True, ""), (False, "web.control")])
def test_the_folder_of_control_sockets_is_there_afterwards_if_it_was_or_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: bool, other: str
) -> None:
    run = tmp_path / "run"
    if before:
        run.mkdir()
    monkeypatch.setattr(control_path, "SYSTEM", str(run))

    class Uses(Told):
        def tell(self) -> bool:
            if other:
                (run / other).touch()
            return True

    monkeypatch.setattr(cli, "Protected", Makes)
    monkeypatch.setattr(cli, "Story", Uses)
    monkeypatch.setattr(cli, "_Stops", NoStops)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert cli.main(["--pause", "0"]) == 0

    assert [each.name for each in tmp_path.iterdir()] == (["run"] if before or other else [])
