"""What the tests of a fleet need, and where they say that it is missing."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.fleet.hosts import NEEDED, TOOLS

MISSING = [each for each in NEEDED if shutil.which(each) is None]

marks = [
    pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: hosts of a test take root"),
    pytest.mark.skipif(bool(MISSING), reason=f"NOT CHECKED: there is no {MISSING}"),
    pytest.mark.skipif(
        not (TOOLS / "ansible-playbook").exists(), reason=f"NOT CHECKED: no Ansible in {TOOLS}"
    ),
    pytest.mark.timeout(1800),
]
