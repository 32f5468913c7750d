"""What a shell is told that completes a line: from the table of options, of each program."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from socketprotector_exporter import main as exporter

from socketprotector.demo.cli import command
from socketprotector.launch import completion
from socketprotector.launch.options import OPTIONS

Completed = Callable[..., list[str]]
VARIABLES = {
    "SocketProtector": completion.VARIABLE,
    "socketprotector-exporter": "_SOCKETPROTECTOR_EXPORTER_COMPLETE",
}


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Completed:
    """What may stand at the end of a line, as bash is told it: `plain,WORD`, `file,BEGUN`."""

    def ask(*line: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", " ".join(line))
        monkeypatch.setenv("COMP_CWORD", str(len(line) - 1))
        monkeypatch.setenv(VARIABLES[line[0]], "bash_complete")
        if line[0] == "SocketProtector":
            assert completion.main(command) == 0
        else:
            with pytest.raises(SystemExit):
                exporter.main([])
        return capfd.readouterr().out.split()

    return ask


def test_each_option_is_in_it(completed: Completed) -> None:
    found = completed("SocketProtector", "--")

    assert {f"plain,--{each.key}" for each in OPTIONS} <= {*found}
    assert completed("SocketProtector", "--gua") == ["plain,--guard"]
    assert completed("SocketProtector", "--guard", "8000", "--name") == ["plain,--name"]


def test_a_value_is_what_its_option_takes(completed: Completed) -> None:
    for option in ("config", "pid-file", "log-file", "env-file", "control", "watch"):
        assert completed("SocketProtector", f"--{option}", "/x") == ["file,/x"]
    assert completed("SocketProtector", "--chdir", "/x") == ["dir,/x"]
    assert completed("SocketProtector", "--handoff", "st") == ["plain,stdio"]
    assert completed("SocketProtector", "--ready", "a") == ["plain,ack", "plain,accept"]
    assert completed("SocketProtector", "--reload-order", "st") == [
        "plain,start-first",
        "plain,stop-first",
    ]
    assert completed("SocketProtector", "--drain-signal", "QU") == ["plain,QUIT"]
    assert "plain,KILL" not in completed("SocketProtector", "--drain-signal", "")
    assert "plain,root" in completed("SocketProtector", "--user", "ro")
    assert "plain,root" in completed("SocketProtector", "--group", "ro")
    assert completed("SocketProtector", "--workers", "") == []


def test_an_option_that_says_something_and_a_file_are_not_asked(completed: Completed) -> None:
    assert completed("SocketProtector", "--version", "--help", "--gua") == ["plain,--guard"]
    line = ("SocketProtector", "--config", "/no/such", "--retire-after", "5", "--gua")
    assert completed(*line) == ["plain,--guard"]


def test_the_first_word_may_be_demo_which_has_options_of_its_own(completed: Completed) -> None:
    assert completed("SocketProtector", "d") == ["plain,demo"]
    assert completed("SocketProtector", "8000", "d") == []
    assert completed("SocketProtector", "demo", "--p") == ["plain,--pause"]


def test_a_command_is_a_file(completed: Completed) -> None:
    assert completed("SocketProtector", "8000", "--", "./d") == ["file,./d"]
    assert completed("SocketProtector", "8000", "--", "./d", "--gua") == ["file,--gua"]


def test_the_exporter_completes_files_too(completed: Completed) -> None:
    assert completed("socketprotector-exporter", "--tls-c") == ["plain,--tls-cert"]
    for option in ("tls-key", "control", "token"):
        assert completed("socketprotector-exporter", f"--{option}", "/x") == ["file,/x"], option


@pytest.mark.parametrize("shell", ["tcsh_complete", "bash_source", ""])
def test_another_shell_is_told_nothing(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(completion.VARIABLE, shell)

    assert completion.main(command) == 1
