"""The hatchling hook that makes the long description of both distributions from their README.md.

Links become absolute, because a package index shows the text outside the repository.
`folder` in pyproject.toml is the README's folder in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: A relative image or link, up to the end of its target.
RELATIVE = re.compile(r"(!\[[^\]]*|)\]\((?![a-z]+:|#)([^)\s]+)")


def with_absolute_links(text: str, repository: str, version: str, folder: str) -> str:
    """Return a Markdown page with its relative links made absolute, to the tag of `version`."""

    def absolute(found: re.Match[str]) -> str:
        image, target = found.groups()
        path, mark, fragment = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        kind = "raw" if image else "blob"
        return f"{image}]({repository}/{kind}/v{version}/{path}{mark}{fragment}"

    return RELATIVE.sub(absolute, text)


class ReadmeHook(MetadataHookInterface):
    """Sets `readme`, a dynamic field in pyproject.toml."""

    def update(self, metadata: dict) -> None:  # type: ignore[type-arg]
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        folder = self.config.get("folder", "")
        repository, version = metadata["urls"]["Source"], metadata["version"]
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": with_absolute_links(text, repository, version, folder),
        }
