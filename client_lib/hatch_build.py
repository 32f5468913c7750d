"""The hook by which hatchling makes the long description of both distributions.

It is README.md with its links made absolute, since a package index knows no repository; those in
the repository stay relative.  `folder` in pyproject.toml says where that README.md is there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: An image or a link, up to the end of what it leads to; none that is absolute or on the page.
RELATIVE = re.compile(r"(!\[[^\]]*|)\]\((?![a-z]+:|#)([^)\s]+)")


def with_absolute_links(text: str, repository: str, version: str, folder: str) -> str:
    """Return a page of Markdown whose links lead to the repository as it was at that version."""

    def absolute(found: re.Match[str]) -> str:
        image, target = found.groups()
        path, mark, fragment = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        kind = "raw" if image else "blob"
        return f"{image}]({repository}/{kind}/v{version}/{path}{mark}{fragment}"

    return RELATIVE.sub(absolute, text)


class ReadmeHook(MetadataHookInterface):
    """Sets `readme`, which pyproject.toml calls dynamic."""

    def update(self, metadata: dict) -> None:  # type: ignore[type-arg]
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        folder = self.config.get("folder", "")
        repository, version = metadata["urls"]["Source"], metadata["version"]
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": with_absolute_links(text, repository, version, folder),
        }
