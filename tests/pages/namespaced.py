"""Runs a script in namespaces of its own, as the pages and the examples of --help need it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.running import ROOT

HERE = Path(__file__).parent
NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
PAGE_S = 120.0

is_root = needs.root_with("unshare", "ip")


def ran_script(folder: Path, script: str, name: str = "the script") -> str:
    """Return what a script prints in namespaces of its own."""
    path = [str(HERE / "standins"), str(Path(sys.executable).parent), os.environ["PATH"], "/sbin"]
    environment = {
        "PATH": os.pathsep.join(path),
        "HOME": "/srv/home",
        "LANG": "C.UTF-8",
        "NO_COLOR": "1",
        "SHELL": "/bin/bash",  # of terminals
        "TERM": "linux",
        "PAGE_VENV": sys.prefix,
        "PAGE_ROOT": str(ROOT),
    }
    words = [str(HERE / "inside.sh"), str(folder), script]
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
