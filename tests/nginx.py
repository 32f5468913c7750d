"""What nginx needs to run as any user."""

from __future__ import annotations

from pathlib import Path


def own_folders(folder: Path | str) -> str:
    """Return directives of its http block: without them it makes folders where only root may."""
    kinds = ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")
    return " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
