"""The site that `make docs` has built: complete, whole links, nothing from elsewhere.

Not a part of `make test`, which has no Sphinx: `make docs` runs it on what it has made.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from socketprotector.core.fleet import PHASES
from tests.pages import links
from tests.running import ROOT

SITE = ROOT / "build" / "site"
#: What a browser loads by itself, by the element; all others are links, which a reader follows.
LOADED = {
    ("script", "src"): "",
    ("img", "src"): "",
    ("iframe", "src"): "",
    ("source", "src"): "",
    ("link", "href"): "",
    ("video", "src"): "",
    ("audio", "src"): "",
    ("object", "data"): "",
    ("img", "srcset"): "",
    ("source", "srcset"): "",
    ("embed", "src"): "",
    ("base", "href"): "",
}
ELSEWHERE = re.compile(r"^(?:[a-z]+:)?//|^[a-z]+://", re.IGNORECASE)
#: In style sheets and scripts.
FETCHED = re.compile(
    r"(?:url\(|@import\s+|\bimport\s*\(|\bfetch\(|\bimportScripts\(|\.src\s*=\s*)[\"']?((?:https?:)?//[^\"')\s]+)"
)


class Page(HTMLParser):
    """What a page loads, what it links to, its ids and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.captions: list[str] = []
        self.link_texts: list[str] = []
        self.language = ""
        self._in_caption = self._in_link = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self.loads += [given[name] for name in given if (tag, name) in LOADED]
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "a":
            self.link_texts.append("")
            self._in_link = True
        if tag == "html":
            self.language = given.get("lang", "")
        self._in_caption = given.get("class") == "caption-text" or (
            tag == "span" and "caption-text" in given.get("class", "")
        )

    def handle_endtag(self, tag: str) -> None:
        self._in_link = self._in_link and tag != "a"

    def handle_data(self, data: str) -> None:
        if self._in_link:
            self.link_texts[-1] += data
        if self._in_caption:
            self.captions.append(data)
            self._in_caption = False


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    assert (SITE / "index.html").exists(), "run make docs"
    return {path: Page(path) for path in sorted(SITE.rglob("*.html"))}


def test_there_is_a_page_for_each(pages: dict[Path, Page]) -> None:
    wanted = [*links.ON_THE_SITE, *links.MANUALS]
    names = {path.relative_to(ROOT).with_suffix(".html") for path in wanted}

    missing = names - {path.relative_to(SITE) for path in pages}

    assert not missing


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    loaded = {
        f"{path.relative_to(SITE)}: {url}"
        for path, page in pages.items()
        for url in page.loads
        if ELSEWHERE.match(url)
    }
    for path in [*SITE.rglob("*.css"), *SITE.rglob("*.js")]:
        found = FETCHED.findall(path.read_text(encoding="utf-8"))
        loaded |= {f"{path.relative_to(SITE)}: {url}" for url in found}

    assert not loaded


@pytest.mark.parametrize(
    "text",
    ["@import 'https://x.y/z'", "src: url(//x.y/z)", 'fetch("http://x.y")', "a.src = '//x/y'"],
)
def test_what_would_be_loaded_from_elsewhere_is_found(text: str) -> None:
    assert FETCHED.search(text)


def test_every_link_within_it_leads_somewhere(pages: dict[Path, Page]) -> None:
    wrong, tried = set(), 0
    for path, page in pages.items():
        for url in {*page.links, *page.loads}:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            tried += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            ids = pages[target].ids if target in pages else set()
            whole = target.is_file() and (not parts.fragment or unquote(parts.fragment) in ids)
            if not whole and url not in ("#", ""):
                wrong.add(f"{path.relative_to(SITE)}: {url}")

    print(f"{tried} links")
    assert not wrong
    assert tried > 2000


def test_links_say_what_a_page_is_about_and_not_its_file(pages: dict[Path, Page]) -> None:
    files = {
        f"{path.relative_to(SITE)}: {text}"
        for path, page in pages.items()
        for text in page.link_texts
        if text.endswith(".md")
    }

    assert not files


def test_each_page_has_all_shelves(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert page.captions == links.SHELVES, path
        assert page.language == "en", path


def test_options_have_their_dashes(pages: dict[Path, Page]) -> None:
    changed = [
        f"{path.relative_to(SITE)}: {found}"
        for path in pages
        for found in re.findall(r"[\u2013\u2014][a-z-]+", path.read_text(encoding="utf-8"))
    ]

    assert not changed


def test_each_page_has_a_heading(pages: dict[Path, Page]) -> None:
    without = [path for path in pages if "<h1>" not in path.read_text(encoding="utf-8")]

    assert not without


def test_the_front_page_is_readme() -> None:
    assert (SITE / "index.html").read_bytes() == (SITE / "README.html").read_bytes()


def test_the_phases_are_drawn_with_each_arrow() -> None:
    text = (SITE / "ARCHITECTURE.html").read_text(encoding="utf-8")
    drawn = text[text.index('<svg class="phases"') :].partition("</svg>")[0]

    assert "stateDiagram" not in text
    for phase, ways in PHASES.items():
        assert f">{phase.value}</text>" in drawn
        for target, why in ways.items():
            assert f">{why}</text>" in drawn
            assert f"{phase.value} to {target.value if target else '(end)'}: {why}" in drawn


def test_its_search_finds_without_a_server() -> None:
    text = (SITE / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))

    found = index["terms"]["nodelay"], index["titleterms"]["scoreboard"]  # a number, or several
    for pages, page in zip(found, ("docs/reference", "docs/protocol"), strict=True):
        assert index["docnames"].index(page) in (pages if isinstance(pages, list) else [pages])
