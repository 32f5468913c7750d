"""Links of a Markdown page, and what links may lead to in one: as GitHub and the site have it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.running import ROOT

#: What the site has, each page on a shelf (tools/site/conf.py).
ON_THE_SITE = sorted(
    {
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "client_lib").rglob("*.md"),
    }
)
#: All that people read: measurements and tests are beside what makes them, and the exporter has a
#: page for an index of packages.
PAGES = sorted(
    {
        *ON_THE_SITE,
        *(
            page
            for each in (".github", "bench", "exporter", "tests")
            for page in (ROOT / each).glob("*.md")
        ),
    }
)
#: .so: another name of a page that is there.
MANUALS = sorted(
    path
    for folder in (ROOT / "docs" / "man", ROOT / "client_lib" / "man", ROOT / "exporter" / "man")
    for path in folder.iterdir()
    if not path.read_text(encoding="utf-8").startswith(".so ")
)
SHELVES = ["Start", "My server", "Operate", "Look up", "How it works"]
_BLOCK = re.compile(r"^```.*?^```$|^(?:    .*\n)+", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`+[^`\n]+`+")
_LINK = re.compile(r"\]\(<?([^)>\s]*)>?(?:\s+\"[^\"]*\")?\)")
_DEFINED = re.compile(r"^\[[^\]]+\]: +(\S+)", re.MULTILINE)
_OF_HTML = re.compile(r"<(?:a|img)\b[^>]*\b(?:href|src)=\"([^\"]*)\"")
_HEADING = re.compile(r"^#{1,6} +(.*?) *#*$", re.MULTILINE)
_LINKED = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def targets(text: str) -> list[str]:
    """Return what the links and images of a page lead to; not those in code."""
    shown = _CODE.sub("", _BLOCK.sub("", text))
    return [*_LINK.findall(shown), *_DEFINED.findall(shown), *_OF_HTML.findall(shown)]


def anchors(text: str) -> set[str]:
    """Return what links may have behind `#`: of each heading its words, of equal ones `-1`, ..."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in _HEADING.findall(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        words = _LINKED.sub(r"\1", heading).replace("`", "").replace("*", "").lower()
        slug = re.sub(r"[^\w -]", "", words).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page: Path, text: str) -> list[str]:
    """Return the links of a page that lead nowhere in the repository."""
    found = []
    for target in targets(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, heading = target.partition("#")
        path = page.parent / name
        if (
            not path.exists()
            or not path.resolve().is_relative_to(ROOT)
            or (heading and name and path.suffix != ".md")
            or (heading and heading not in anchors(path.read_text() if name else text))
        ):
            found.append(target)
    return found
