"""What this release answers: the status in the file that RELEASE names, read once, at the start.

So that a test can deploy one that is broken: the program is the same.
"""

from __future__ import annotations

import os
from pathlib import Path

STATUS = 200
if file := os.environ.get("RELEASE"):
    STATUS = int(Path(file).read_text(encoding="ascii"))
