"""The tables of options in the documents are those that would be made of the options."""

from __future__ import annotations

import subprocess
import sys

from tests.running import ROOT


def test_the_pages_say_what_the_options_are() -> None:
    command = [sys.executable, str(ROOT / "tools" / "reference.py"), "--check"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
