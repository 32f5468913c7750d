"""Certificates for servers in tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests import needs

_MAKE = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"


def self_signed(folder: Path) -> Path:
    """Make a certificate that no client trusts; return the file, which also has its key."""
    key, certificate, both = (folder / f"{each}.pem" for each in ("key", "certificate", "both"))
    words: list[str | Path] = [
        *_MAKE.split(),
        "-subj",
        "/CN=no.such.name",
        "-keyout",
        key,
        "-out",
        certificate,
    ]
    try:
        made = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        needs.skip("openssl")
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return both
