"""scale, lame-duck, hold, replace, kill, stop, upgrade, log-level, and how errors are reported."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from socketprotector.ctl import orders
from socketprotector.ctl.cli import program
from socketprotector.ctl.client import Client
from tests import forked
from tests.running import DEADLINE_S, ROOT, Ended, Lines, eventually
from tests.together import together
from tests.unit.ctl.conftest import COMMAND
from tests.unit.ctl.fake import (
    Connection,
    Fake,
    Message,
    Refusing,
    generation,
    listener,
    status,
    worker,
)

Ctl = Callable[..., Ended]


@pytest.mark.parametrize(
    ("written", "asked"),
    [("3", {"to": 3}), ("+1", {"by": 1}), ("-1", {"by": -1}), ("-12", {"by": -12})],
)
def test_scale(written: str, asked: Message, fake: Fake, ctl: Ctl) -> None:
    fake.answers["scale"] = lambda *_: {"workers": 3}

    assert ctl("scale", written) == Ended(0, "3 workers wanted\n", "")
    assert ctl("scale", written, "--json").out == '{"workers": 3}\n'
    assert fake.asked == [{"command": "scale", **asked}] * 2


@together(
    ("arguments", "told"),
    [
        (["scale"], "Missing argument 'N|+N|-N'; see socketprotectorctl scale --help"),
        (["scale", "-x"], "Invalid value for N: '-x': write N, +N or -N"),
        (["scale", "1.5"], "Invalid value for N: '1.5': write N, +N or -N"),
        (["kill", "x"], "'x' is not a valid integer range"),
        (["kill"], "Missing argument 'GENERATION'"),
        (["replace", "web"], "'web': write a generation or a pid"),
        (["log-level", "loud"], "'loud' is not one of 'debug', 'info', 'warning', 'error'"),
        (["lame-duck"], "Missing argument 'on|off'"),
        (["hold", "--for", "0"], "it must be above 0"),
        (["hold", "--for", "soon"], "'soon' is no duration; write 500ms, 10s, 1h30m or seconds"),
        (["relaod"], "No such command 'relaod'"),
        (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
        (["completion"], "Choose from: bash, zsh, fish; see"),
        (["status", "--jsno"], "No such option"),
        ([], "no command; choose one of completion, connections"),
        (["top"], "top: needs a terminal; use status, or top --json"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(
    arguments: list[str], told: str, fake: Fake, ctl: Ctl
) -> None:
    said = ctl(*arguments)

    assert said.status == 2
    assert said.err.startswith("socketprotectorctl: ")
    assert told in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_what_the_protector_finds_wrong_with_an_argument_is_status_2(fake: Fake, ctl: Ctl) -> None:
    def answer(*_: object) -> Message:
        raise Refusing("invalid", "scale: to: 0 is not a whole number from 1 to 1000000")

    fake.answers["scale"] = answer

    assert ctl("scale", "0").status == 2


@pytest.mark.parametrize(
    ("state", "words"),
    [("on", "lame duck: still serving, but not ready for new clients\n"), ("off", "ready again\n")],
)
def test_lame_duck(state: str, words: str, fake: Fake, ctl: Ctl) -> None:
    fake.answers["lame-duck"] = lambda *_: {"lame_duck": state}

    assert ctl("lame-duck", state) == Ended(0, words, "")
    assert ctl("lame-duck", state, "--json").out == f'{{"lame_duck": "{state}"}}\n'
    assert fake.asked == [{"command": "lame-duck", "on": state == "on"}] * 2


def test_hold_for_a_time_returns_at_once(fake: Fake, ctl: Ctl) -> None:
    fake.answers["hold"] = lambda *_: {"until_at": 1.0}

    assert ctl("hold", "--for", "2m30s") == Ended(
        0, "on hold for 2m30s; `socketprotectorctl release` ends the hold earlier\n", ""
    )
    assert fake.asked == [{"command": "hold", "seconds": 150.0}]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_hold_lasts_as_long_as_the_command_and_releases_at_its_end(
    number: signal.Signals, fake: Fake
) -> None:
    fake.answers["hold"] = lambda *_: {"until_at": 1.0}
    fake.answers["release"] = lambda *_: {}
    receive, send = os.pipe()
    process = forked.popen([*COMMAND, "hold"], stdout=send)
    os.close(send)
    lines = Lines(receive)
    lines.wait_for("on hold while this command runs; Ctrl-C ends the hold")
    fake.cut_all()  # an upgrade in between
    eventually(lambda: fake.commands().count("hold") >= 2, "asked again")
    process.send_signal(number)

    assert process.wait(DEADLINE_S) == 0
    lines.join()
    assert lines.seen[-1] == "released"
    assert fake.commands()[-1] == "release"
    assert {each.get("seconds") for each in fake.asked if each["command"] == "hold"} == {5.0}


def test_a_hold_that_cannot_be_released_is_not_called_released(fake: Fake) -> None:
    fake.answers["hold"] = lambda *_: {"until_at": 1.0}  # and `release` is refused
    with forked.popen(
        [*COMMAND, "hold"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            eventually(lambda: "hold" in fake.commands(), "on hold")
            assert process.stdout is not None
            process.stdout.readline()
        finally:
            process.terminate()
        out, err = process.communicate(timeout=DEADLINE_S)

    assert "could not release the hold" in err
    assert "released" not in out


def test_a_hold_asks_again_long_before_it_runs_out() -> None:
    assert orders._RENEW_HOLD_EVERY_S * 3 < orders._HOLD_S


def test_replace_finds_out_whether_it_is_a_generation_or_a_pid(fake: Fake, ctl: Ctl) -> None:
    fake.status = status(generation(8, "serving", worker(14, 4712), worker(15, 8)))
    fake.answers["replace"] = lambda _, asked: (
        {"generation": 8} if "generation" in asked else {"worker": 16}
    )

    assert ctl("replace", "4712").out == "worker 16 leaves when its replacement is ready\n"
    both = ctl("replace", "8")
    assert both.status == 2
    assert "8 is a generation and a pid; write generation:8 or pid:8" in both.err
    assert ctl("replace", "generation:8").out == (
        "a new generation of the same command replaces generation 8, which then drains\n"
    )
    neither = ctl("replace", "7")
    assert neither.status == 100
    assert "7 is neither a generation nor a worker's pid; generations: 8" in neither.err
    asked = [each for each in fake.asked if each["command"] == "replace"]
    assert asked == [{"command": "replace", "pid": 4712}, {"command": "replace", "generation": 8}]


@pytest.mark.parametrize("which", ["4713", "pid:4713"])
def test_replace_of_a_forked_child_says_that_its_parent_stays(
    which: str, fake: Fake, ctl: Ctl
) -> None:
    child = {"number": 0, "pid": 4713}
    fake.status = status(generation(8, "serving", worker(14, 4712, processes=[child])))
    fake.answers["replace"] = lambda *_: {"worker": 14}

    said = "process 4713 finishes; its parent, worker 14, forks another\n"
    assert ctl("replace", which).out == said


def test_kill_log_level_reopen_and_release(fake: Fake, ctl: Ctl) -> None:
    fake.answers["kill"] = lambda *_: {"workers": 2}
    fake.answers["log-level"] = lambda *_: {"level": "debug"}
    fake.answers["reopen"] = lambda *_: {}
    fake.answers["release"] = lambda *_: {}

    assert ctl("kill", "7").out == "killed 2 workers of generation 7\n"
    assert ctl("log-level", "debug").out == "log level debug\n"
    assert ctl("reopen").out == "reopened\n"
    assert ctl("release").out == "released\n"


# -- stop ---------------------------------------------------------------------------------


@pytest.fixture
def protected(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the place of the protector's; it ends when its stdin does."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        sender = property(lambda _: process.pid, lambda *_: None)
        monkeypatch.setattr(Client, "protector_pid", sender, raising=False)
        yield process


def test_stop_waits_for_the_end_of_the_process(
    fake: Fake, ctl: Ctl, protected: subprocess.Popen[bytes]
) -> None:
    fake.status.update(pid=protected.pid, main_pid=protected.pid)

    def answer(connection: Connection, asked: Message) -> None:
        fake.status = status(
            generation(8, "draining", worker(14)),
            phase="stopping",
            pid=protected.pid,
            main_pid=protected.pid,
        )
        connection.send({"v": 1, "id": asked["id"], "ok": True, "result": {}})
        connection.event("stopping")
        fake.answers["status"] = looked

    def looked(connection: Connection, asked: Message) -> None:
        connection.send({"v": 1, "id": asked["id"], "ok": True, "result": fake.status})
        threading.Thread(target=gone).start()

    def gone() -> None:
        fake.end()
        assert protected.stdin
        threading.Timer(0.3, protected.stdin.close).start()  # it is waited for, however long

    fake.answers["stop"] = answer

    said = ctl("stop")

    assert (said.status, said.out) == (0, "stopped: web\n")
    assert said.err == ""
    assert protected.poll() == 0
    assert {"command": "stop", "quick": False} in fake.asked


def test_stop_says_once_for_how_long_it_still_accepts(
    fake: Fake, ctl: Ctl, protected: subprocess.Popen[bytes]
) -> None:
    def answer(connection: Connection, asked: Message) -> None:
        fake.status.update(phase="stopping", lame_duck="stopping", lame_duck_s=9.7)
        connection.send({"v": 1, "id": asked["id"], "ok": True, "result": {}})
        connection.event("lame-duck")
        fake.answers["status"] = looked

    def looked(connection: Connection, asked: Message) -> None:
        connection.send({"v": 1, "id": asked["id"], "ok": True, "result": fake.status})
        if fake.status["lame_duck_s"] == 9.7:
            fake.status["lame_duck_s"] = 0.1
            connection.event("exited")  # a worker's, of an old generation
            return
        assert protected.stdin
        protected.stdin.close()
        threading.Thread(target=fake.end).start()

    fake.status.update(pid=protected.pid, main_pid=protected.pid)
    fake.answers["stop"] = answer

    said = ctl("stop")

    assert said == Ended(0, "stopped: web\n", "lame duck: still serving; the stop begins in 10s\n")


@pytest.mark.parametrize("silent_at_the_end", [False, True])
def test_stop_that_takes_too_long_is_status_4(
    fake: Fake, ctl: Ctl, protected: subprocess.Popen[bytes], silent_at_the_end: bool
) -> None:
    real, heard = fake.answers["status"], []

    def late(connection: Connection, asked: Message) -> Message | None:
        if fake.status["phase"] == "stopping":
            heard.append(asked)
        return real(connection, asked) if len(heard) <= 1 else None

    if silent_at_the_end:
        fake.answers["status"] = late

    def answer(*_: object) -> Message:
        fake.status["phase"] = "stopping"
        fake.status["generations"] = [generation(8, "draining", worker(14))]
        return {}

    fake.status.update(pid=protected.pid, main_pid=protected.pid)
    fake.answers["stop"] = answer

    said = ctl("stop", "--quick", "--timeout", "3s")

    assert said.status == 4
    left = "generation 8 (1 worker: pid 4712, 3 connections)"
    assert f"still waiting for {left} to finish" in said.err
    protected.communicate()


def test_stop_is_never_asked_twice_for_that_would_be_at_once(fake: Fake, ctl: Ctl) -> None:
    def answer(connection: Connection, _: Message) -> None:
        fake.status["phase"] = "stopping"
        connection.cut()

    fake.status.update(pid=0, main_pid=0)
    fake.answers["stop"] = answer

    assert ctl("stop", "--timeout", "500ms").status == 4
    assert fake.commands().count("stop") == 1


@pytest.mark.parametrize("answered", [True, False])
def test_stop_does_not_stop_a_protector_that_was_started_since(
    fake: Fake, ctl: Ctl, protected: subprocess.Popen[bytes], answered: bool
) -> None:
    def answer(connection: Connection, asked: Message) -> None:
        protected.kill()
        if answered:
            connection.send({"v": 1, "id": asked["id"], "ok": True, "result": {}})
        fake.status["started_at"] += 60.0
        connection.cut()

    fake.status.update(pid=protected.pid, main_pid=protected.pid)
    fake.answers["stop"] = answer

    assert ctl("stop") == Ended(0, "stopped: web\n", "")
    assert fake.commands().count("stop") == 1


def test_stop_without_waiting(fake: Fake, ctl: Ctl) -> None:
    fake.answers["stop"] = lambda *_: {}

    assert ctl("stop", "--no-wait") == Ended(0, "stop requested\n", "")


# -- upgrade ---------------------------------------------------------------------------------


def test_upgrade_waits_for_the_new_program(fake: Fake, ctl: Ctl) -> None:
    fake.status["pid"] = 11

    def answer(connection: Connection, asked: Message) -> None:
        connection.send(
            {"v": 1, "id": asked["id"], "ok": True, "result": {"from": "0.9.0", "starts": 1}}
        )
        fake.status["restarts"], fake.status["version"] = 1, "0.9.1"
        connection.cut()

    fake.answers["upgrade"] = answer

    assert ctl("upgrade") == Ended(0, "upgraded: pid 11 runs 0.9.1 (0.9.0 before)\n", "")


def test_an_upgrade_of_a_protector_that_ends_is_not_done_by_one_that_was_started_since(
    fake: Fake, ctl: Ctl
) -> None:
    def answer(connection: Connection, asked: Message) -> None:
        connection.send({"v": 1, "id": asked["id"], "ok": True, "result": {"from": "0.9.0"}})
        fake.status["started_at"] += 60.0
        connection.cut()

    fake.answers["upgrade"] = answer

    words = "the protector has ended, and another one was started"
    assert ctl("upgrade") == Ended(1, "", f"socketprotectorctl: {words}\n")


def test_upgrade_that_stays_with_the_old_is_status_3_with_the_probes_words(
    fake: Fake, ctl: Ctl
) -> None:
    def answer(connection: Connection, asked: Message) -> None:
        connection.send({"v": 1, "id": asked["id"], "ok": True, "result": {"from": "0.9.0"}})
        connection.event("upgrade-failed", reason="the new program exited with status 1: boom\x1b")

    fake.answers["upgrade"] = answer

    said = ctl("upgrade", "--wait")

    assert said == Ended(
        3,
        "",
        "socketprotectorctl: not upgraded: 0.9.0 keeps running: the new program exited with "
        "status 1: boom\\x1b\n",
    )


def test_an_upgrade_that_a_stop_ends_is_status_3(fake: Fake, ctl: Ctl) -> None:
    def answer(connection: Connection, asked: Message) -> None:
        connection.send({"v": 1, "id": asked["id"], "ok": True, "result": {"from": "0.9.0"}})
        connection.event("stopping")
        fake.path.unlink()
        connection.cut()

    fake.answers["upgrade"] = answer

    said = ctl("upgrade")

    assert (said.status, said.out) == (3, "")
    assert said.err == (
        "the protector is being stopped\n"
        "socketprotectorctl: not upgraded: the protector was stopped\n"
    )


def test_an_older_protector_has_no_check(fake: Fake, ctl: Ctl) -> None:
    def answer(connection: Connection, asked: Message) -> None:
        error = "upgrade: unknown argument 'check'; allowed: none"
        refusal = {"ok": False, "code": "invalid", "error": error}
        connection.send({"v": 1, "id": asked["id"], **refusal})

    fake.answers["upgrade"] = answer

    said = ctl("upgrade", "--check")

    words = "this protector's version cannot check an upgrade; nothing was tried"
    assert said == Ended(100, "", f"socketprotectorctl: {words}\n")


@pytest.mark.parametrize("more", ["--no-wait", "--timeout=3s"])
def test_a_check_takes_no_option_of_an_upgrade(ctl: Ctl, more: str) -> None:
    said = ctl("upgrade", "--check", more)

    assert (said.status, said.out) == (2, "")
    assert "--check takes neither --no-wait nor --timeout" in said.err


# -- completion -------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, fake: Fake, ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    told = ctl("completion", shell).out

    for name in ("SocketProtector", "socketprotector", "socketprotectorctl"):
        assert f"_{name.upper()}_COMPLETE" in told
        assert f"_{name}_completion" in told
    assert "_socketprotector_exporter_completion" in told
    assert "_SOCKETPROTECTOR_COMPLETE" not in ctl("completion", shell, "socketprotectorctl").out


def completed(*line: str) -> list[str]:
    environment = {
        **os.environ,
        "_SOCKETPROTECTORCTL_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("socketprotectorctl", *line)),
        "COMP_CWORD": str(len(line)),
    }
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=True)
    return [each.partition(",")[2] for each in done.stdout.splitlines()]


def test_completion_offers_no_word_that_a_shell_would_read(fake: Fake) -> None:
    """Who makes a release's folder chooses its name; who starts a protector, the protector's."""
    names = ["1", "1;reboot", "1$(reboot)", "1`reboot`", "1 2", "1\n2", "1'", "1*", "1&", "1-a"]
    releases = [{"release": each} for each in names]
    fake.answers["releases"] = lambda *_: {"releases": releases}

    for words in (("deploy",), ("rollback", "--expect"), ("deploy", "--expect")):
        assert completed("--name", "web", *words, "1") == ["1", "1-a"]


def test_completion_knows_names_and_generations(fake: Fake) -> None:
    assert completed("--name", "w") == ["web"]
    assert completed("--name", "web", "kill", "8") == ["8"]
    assert completed("relo") == ["reload"]


def test_bash_completes_what_it_breaks_at_an_equals_sign_or_a_colon(
    fakes: Callable[[str], Fake], ctl: Ctl
) -> None:
    for key, port in (("web", 80), ("web:81", 81)):
        listeners = [listener(f"tcp:127.0.0.1:{port}")]
        fakes(key).status.update(name="web", listeners=listeners)
    script = ctl("completion", "bash", "socketprotectorctl").out

    def completed(line: str) -> list[str]:
        # Where there is no terminal, bash does not set this variable.
        breaks = r"""COMP_WORDBREAKS=$' \t\n"\'><=;|&(:'"""
        does = '_socketprotectorctl_completion "$1"; printf "%s\n" "${COMPREPLY[@]}"'
        words = ("-c", f"{script}\n{breaks}\n{does}", "-", "\n".join(COMMAND))
        typed = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
        return subprocess.check_output(("bash", *words), env=typed, text=True).splitlines()

    assert completed("socketprotectorctl --name web:8") == ["80", "81"]
    assert completed("socketprotectorctl --name=") == ["web:80", "web:81"]
    assert completed("socketprotectorctl --name web:81 kill ") == ["8"]


@together("option", ["", "--name", "--control", "--pid-file"])
def test_a_command_in_a_message_has_the_instance_that_the_reader_named(
    option: str, fake: Fake, ctl: Ctl, tmp_path: Path
) -> None:
    pid_file = tmp_path / "the pid"
    pid_file.write_text(f"{os.getpid()}\n")
    value = {"--name": "web", "--control": str(fake.path), "--pid-file": str(pid_file)}
    words = [option, value[option]] if option else []

    def refuse(*_: object) -> None:
        raise Refusing("refused", "see `status`, then `scale +1`; `list` shows all, `true` nothing")

    fake.answers["scale"] = refuse

    said = ctl(*words, "scale", "3")

    line = " ".join(("socketprotectorctl", *map(shlex.quote, words)))
    assert said.err == (
        f"socketprotectorctl: see `{line} status`, then `{line} scale +1`; `list` shows all, "
        "`true` nothing\n"
    )


def test_each_printed_command_is_in_backquotes_so_that_it_gets_the_instance() -> None:
    for path in (ROOT / "socketprotector" / "ctl").glob("*.py"):
        if path.name == "help_pages.py":
            continue
        for each in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(each, ast.Constant) and isinstance(each.value, str):
                named = {*re.findall(r"socketprotectorctl ([a-z-]+)", each.value)}
                bare = program.commands.keys() & named - {"list", "completion"}
                assert not bare, (path.name, each.value)
