"""What is published: the wheels and sdists of each distribution, built for the tests here."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.running import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]
NAMES = tuple(
    f"{name}-{VERSION}{end}"
    for name in ("socketprotector", "socketprotector_client", "socketprotector_exporter")
    for end in ("-py3-none-any.whl", ".tar.gz")
)
WHEELS, SDISTS = NAMES[::2], NAMES[1::2]
#: A time for what is in them, which is not that of any file here.
EPOCH = "1700000000"


def build(root: Path, folder: Path, umask: int = 0o022, **environment: str) -> None:
    """Build all of them from the sources in a folder into another one."""
    subprocess.run(
        [root / "packaging" / "build-dists", folder],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        umask=umask,
        env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH, "PYTHON": sys.executable, **environment},
    )
