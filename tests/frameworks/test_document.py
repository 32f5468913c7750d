"""The programs and commands in docs/frameworks.md, taken from there and run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import needs
from tests.frameworks.asking import PATH, port_of
from tests.pages import page
from tests.running import DEADLINE_S, ROOT, Protector

PAGE = ROOT / "docs" / "frameworks.md"
TEXT = PAGE.read_text()
#: By the name of the file, which is the comment in the first line.
FILES = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))
PROGRAMS = [name for name in FILES if "/" not in name]
#: Indented, outside of the programs.
COMMANDS = [each for block in page.blocks(PAGE) if not block.kind for each in block.commands]
UNDER = "SocketProtector 4321 -- "
#: What stands there for each program.
RUN = f"{UNDER}python on_uvicorn.py"
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader has put all that is on the page."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def words_of(command: str) -> list[str]:
    """A command of the page; what it calls is what is installed beside our Python."""
    program, *rest = shlex.split(command)
    if program == "python":
        return [sys.executable, *rest]
    beside = Path(sys.executable).parent / program
    assert beside.exists(), f"{program} is not installed: pip install -e '.[dev]'"
    return [str(beside), *rest]


def skip_without(program: str) -> None:
    """Skip a program that imports what is not there."""
    names = re.findall(
        r"^(?:import|from) (?:socketprotector_client\.)?(\w+)", program, re.MULTILINE
    )
    for name in names:
        if name != "shop" and find_spec(name) is None:
            needs.skip(name)


def ask(port: int, program: str = "") -> None:
    """Ask once, and want the answer that the page has the program give."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
        client.sendall(REQUEST)
        file = client.makefile("rb")
        if "def talk" in program:
            assert file.read(len(REQUEST)) == REQUEST
        else:
            whole = file.read()
            assert whole.startswith(b"HTTP/1.1 200 "), whole
            assert whole.endswith(b"\r\n\r\nhello\n"), whole
        file.close()


def serves(
    protector: Callable[..., Protector], folder: Path, command: str, program: str = ""
) -> Protector:
    """Start it under a protector, ask, reload, ask, stop."""
    words = words_of(command.removeprefix(UNDER))
    daemon = protector("--chdir", folder, "127.0.0.1:0", "--", *words, **PATH).ready()

    ask(daemon.port, program)
    daemon.reload()
    ask(daemon.port, program)
    daemon.log.wait_for(r"event=drained generation=1$")
    daemon.stop()
    assert daemon.log.count("Traceback") == 0
    return daemon


def test_every_program_has_a_name() -> None:
    assert TEXT.count("```python\n") == len(FILES)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_serves_is_reloaded_and_stopped(
    protector: Callable[..., Protector], folder: Path, name: str
) -> None:
    assert RUN in COMMANDS
    skip_without(FILES[name])

    daemon = serves(protector, folder, RUN.replace("on_uvicorn.py", name), FILES[name])

    # "so the log says that the worker was killed by it; that is its ordinary end"
    how = "was killed by SIGTERM" if name == "on_uvicorn.py" else "exited with status 0"
    assert daemon.log.count(rf'event=exited .*how="{how}"$') == 2


@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if each.startswith(UNDER) and each != RUN]
)
def test_a_command_serves_is_reloaded_and_stopped(
    protector: Callable[..., Protector], folder: Path, command: str
) -> None:
    skip_without("import gunicorn" if "gunicorn" in command else "import waitress")

    daemon = serves(protector, folder, command)

    assert daemon.log.count(r'event=exited .*how="exited with status 0"$') == 2


@pytest.mark.parametrize("what", [*PROGRAMS, *(each for each in COMMANDS if " --bind " in each)])
def test_it_serves_without_a_protector(
    marked_environment: dict[str, str], folder: Path, what: str
) -> None:
    text = FILES.get(what, "")
    skip_without(text or "import waitress")
    if text:
        (folder / what).write_text(text.replace("4321", '"127.0.0.1:0"'))
    command = f"python {what}" if text else what.replace("--bind 4321", "--bind 127.0.0.1:0")
    words = words_of(command)

    process = subprocess.Popen(words, env={**os.environ, **marked_environment, **PATH}, cwd=folder)
    try:
        ask(port_of(process.pid), text)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_S)
