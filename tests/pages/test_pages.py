"""Every command of the documents is run as it stands, or is read by the program that it is for.

A page is run by one shell, in namespaces of its own: it may have port 443, /etc and /run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests import needs
from tests.pages import links, page
from tests.pages.namespaced import is_root, ran_script
from tests.pages.page import Block
from tests.running import ROOT
from tests.together import together

HERE = Path(__file__).parent
costly = pytest.mark.costly
#: Those of which each block is run here, and what that takes beside ourselves.
RUN: dict[str, tuple[str, ...]] = {
    "CONTRIBUTING.md": ("make",),
    "README.md": ("curl", "gunicorn", "script"),
    "bench/README.md": ("make",),
    "client_lib/man/socketprotector-run.1": ("socketprotector-run",),
    "docs/containers.md": ("curl", "nsenter"),
    "docs/control.md": (),
    "docs/deploy.md": (),
    "docs/install.md": (),
    "bench/soak.md": ("make",),
    "docs/fleet.md": ("curl", "haproxy"),
    "docs/log.md": ("logrotate",),
    "docs/long-lived.md": ("curl", "uvicorn"),
    "docs/man/SampleClient.1": ("nc", "script"),
    "docs/man/SocketProtector.8": (),
    "docs/man/socketprotectorctl.1": ("jq", "script"),
    "docs/modes.md": ("curl", "uvicorn"),
    "docs/moving.md": (
        *("curl", "gunicorn", "plackup", "start_server", "supervisord", "systemctl"),
        "systemd-socket-activate",
    ),
    "docs/operating.md": ("script",),
    "docs/metrics.md": ("curl", "openssl", "systemctl"),
    "docs/probes.md": ("curl",),
    "docs/reference.md": (),
    "docs/rollout.md": ("curl", "gunicorn", "pgrep"),
    "docs/security.md": ("apparmor_parser", "semanage", "restorecon", "systemctl"),
    "docs/servers.md": (
        *("curl", "gunicorn", "hypercorn", "nginx", "node", "plackup", "starman", "uvicorn"),
    ),
    "docs/start.md": ("curl", "gunicorn", "script", "uvicorn"),
    "docs/stdio.md": ("curl",),
    "docs/systemd.md": ("curl", "systemctl"),
    "docs/tls.md": ("openssl", "curl", "haproxy", "stunnel", "gunicorn", "uvicorn"),
}
#: In `make test-all` alone: above 3 s of a processor, or what they show has tests in `make test`.
COSTLY = {
    *{"bench/README.md", "bench/soak.md", "docs/containers.md", "docs/fleet.md"},
    *{"docs/man/socketprotectorctl.1", "docs/modes.md", "docs/operating.md", "docs/reference.md"},
    *{"docs/long-lived.md", "docs/metrics.md", "docs/moving.md", "docs/probes.md"},
    *{"docs/rollout.md", "docs/servers.md", "docs/stdio.md", "docs/tls.md"},
}
#: Those whose commands another test runs.
ELSEWHERE = {
    "docs/inherited-socket.md": "tests/servers/test_inherited_socket.py builds and reloads each",
    "docs/frameworks.md": "tests/frameworks/test_document.py runs each program and command",
    "client_lib/README.md": "tests/client/test_readme.py runs each program, tests/c those in C",
    "exporter/README.md": "docs/metrics.md has the same commands",
}
#: Of the pages on the site, and of a line of code there, at 1280 px.
SITE = [*links.ON_THE_SITE, *links.MANUALS]
COLUMNS = 90


def blocks(name: str) -> list[Block]:
    return page.blocks(ROOT / name)


@is_root
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=costly if each in COSTLY else ()) for each in RUN]
)
def test_a_page_does_and_says_what_it_shows(tmp_path: Path, name: str) -> None:
    missing = [each for each in RUN[name] if not found(each)]
    if missing:
        needs.skip(", ".join(missing))

    output = ran_script(tmp_path, page.script(blocks(name)), name)

    print(output)
    assert page.is_whole(output), f"{name} ended early:\n{output}"
    before, screen, said = None, None, page.said(output, blocks(name))
    for block in blocks(name):
        if block.kind == "sh terminal":
            screen = block
        elif block.is_run:
            before = block
        if block.is_text:
            teller = screen if block.kind == "text terminal" else before
            assert teller is not None, f"{name}:{block.line}: nothing has said it"
            lines = said[teller].split("\n")
            for shown in block.text.strip().split("\n"):
                assert any(page.is_like(shown, line) for line in lines), (shown, said[teller])


def found(program: str) -> bool:
    return bool(shutil.which(program) or (Path(sys.executable).parent / program).exists())


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*links.PAGES, *links.MANUALS])


@together("name", PAGES)
def test_nothing_on_a_page_is_only_to_be_looked_at(name: str) -> None:
    found = blocks(name)
    for block in [] if name in ELSEWHERE else found:
        is_used = name in RUN and (block.is_run or block.is_judged or block.file or block.is_text)
        assert is_used or block.taker or block.is_picture, f"{name}:{block.line}: not run"
        assert not block.taker or f'"{name}"' in (ROOT / block.taker).read_text()
    assert name not in RUN or any(block.is_run for block in found)


@together("name", [path.relative_to(ROOT).as_posix() for path in SITE])
def test_code_fits_the_column_of_the_site_and_its_comments_have_lines_of_their_own(
    name: str,
) -> None:
    lines = [
        line
        for block in blocks(name)
        if not (block.is_picture or block.is_output)
        for line in block.text.split("\n")
    ]

    assert not [line for line in lines if len(line) > COLUMNS]
    assert not [line for line in lines if re.search(r"\S\s+(?:#|//) ", line)]


def test_a_command_may_be_wanted_to_fail() -> None:
    text = "# exit status 3: it is broken\nsh -c \\\n    'exit 3'\n"
    done = subprocess.run(["bash", "-c", page.script([Block(1, "sh", text)])], capture_output=True)
    assert done.returncode == 0

    done = subprocess.run(
        ["bash", "-c", page.script([Block(1, "sh", text.replace("'exit 3'", "true"))])],
        capture_output=True,
    )
    assert b"status 0" in done.stdout


@pytest.mark.parametrize(
    ("kind", "text"),
    [("plain", "a --> b\n"), ("drawing", "a\n  $ make all\n"), ("report", "curl x\n"), ("", "x")],
)
def test_a_command_is_no_picture(kind: str, text: str) -> None:
    assert not Block(1, kind, text).is_picture
    assert Block(1, "drawing", "a --> make\n").is_picture


def test_what_is_left_out_is_there() -> None:
    for name, reason in ELSEWHERE.items():
        assert (ROOT / name).exists(), name
        assert (ROOT / reason.split()[0]).exists(), reason


@cache
def all_tests() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}


@together("name", PAGES)
def test_each_test_that_it_names_exists(name: str) -> None:
    for named in re.findall(r"`((?:tests/[\w/]+|test_\w+)\.py)`", (ROOT / name).read_text()):
        paths = all_tests()
        assert any(path == named or path.endswith(f"/{named}") for path in paths), named
