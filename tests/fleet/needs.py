"""What the tests of a fleet need, and where they say that it is missing."""

from __future__ import annotations

import pytest

from tests import needs
from tests.fleet.hosts import NEEDED, TOOLS

marks = [
    needs.ROOT,
    needs.programs(*NEEDED),
    needs.unless((TOOLS / "ansible-playbook").exists(), f"Ansible in {TOOLS}"),
    pytest.mark.timeout(1800),
]
