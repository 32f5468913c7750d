"""Every command of the documents is run as it stands, or is read by the program that it is for.

A page is run by one shell, in namespaces of its own: it may have port 443, /etc and /run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import page
from tests.pages.page import Block
from tests.running import ROOT

HERE = Path(__file__).parent
DOCS = ROOT / "docs"
#: Those of which each block is run here, and what that takes beside ourselves.
RUN: dict[str, tuple[str, ...]] = {
    "docs/tls.md": ("openssl", "curl", "haproxy", "stunnel", "gunicorn", "uvicorn"),
    "docs/proxy-protocol.md": ("curl", "haproxy", "gunicorn"),
    "docs/containers.md": ("curl", "nsenter"),
    "docs/confinement.md": ("apparmor_parser", "semanage", "restorecon", "systemctl"),
    "docs/moving.md": (
        *("curl", "gunicorn", "plackup", "start_server", "supervisord", "systemctl"),
        *("systemd-socket-activate", "systemd-analyze"),
    ),
}
NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
PAGE_S = 120.0

is_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"),
    reason="NOT CHECKED: namespaces, which take root, unshare(1) and ip(8)",
)


def blocks(name: str) -> list[Block]:
    return page.blocks(ROOT / name)


def ran(folder: Path, name: str) -> str:
    """What a page says when it is run."""
    path = [str(HERE / "standins"), str(Path(sys.executable).parent), os.environ["PATH"], "/sbin"]
    environment = {
        "PATH": os.pathsep.join(path),
        "HOME": "/srv/home",
        "LANG": "C.UTF-8",
        "PAGE_VENV": sys.prefix,
        "PAGE_ROOT": str(ROOT),
    }
    words = [str(HERE / "inside.sh"), str(folder), page.script(blocks(name))]
    try:
        done = subprocess.run(
            ["unshare", *NAMESPACES, "bash", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=PAGE_S,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"{name} did not end:\n{(late.output or b'').decode('utf-8', 'replace')}")
    return done.stdout.decode("utf-8", "replace")


@is_root
@pytest.mark.parametrize("name", RUN)
def test_a_page_does_and_says_what_it_shows(tmp_path: Path, name: str) -> None:
    missing = [each for each in RUN[name] if not found(each)]
    if missing:
        pytest.skip(f"NOT CHECKED: there is no {', '.join(missing)}")

    output = ran(tmp_path, name)

    print(output)
    assert page.is_whole(output), f"{name} ended early:\n{output}"
    before, said = None, page.said(output, blocks(name))
    for block in blocks(name):
        if block.is_run:
            before = block
        if block.kind == "text":
            assert before is not None, f"{name}:{block.line}: nothing has said it"
            lines = said[before].split("\n")
            for shown in block.text.strip().split("\n"):
                assert any(page.is_like(shown, line) for line in lines), (shown, said[before])


def found(program: str) -> bool:
    return bool(shutil.which(program) or (Path(sys.executable).parent / program).exists())


@pytest.mark.parametrize("name", RUN)
def test_nothing_on_such_a_page_is_only_to_be_looked_at(name: str) -> None:
    for block in blocks(name):
        known = block.is_run or block.is_judged or block.file or block.kind == "text"
        assert known, f"{name}:{block.line}: neither run nor a file nor what was said"
    assert any(block.is_run for block in blocks(name))


@pytest.mark.parametrize("name", [*RUN, "README.md", "SECURITY.md", "docs/when-not.md"])
def test_its_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8")):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), target
