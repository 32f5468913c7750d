"""Every link within the repository leads to a file, and a heading of it; each page has a shelf."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.pages import links
from tests.running import ROOT
from tests.together import together

INDEX = ROOT / "docs" / "index.md"
NAMED = re.compile(r"(?<![\w/.-])((?:docs|client_lib|bench)/[\w/-]+\.md)\b")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@together("page", links.PAGES)
def test_its_links_lead_somewhere(page: Path) -> None:
    assert not links.broken(page, page.read_text(encoding="utf-8"))


@together(
    ("link", "leads"),
    [
        ("docs/log.md", True),
        ("docs/log.md#a-crash-loop", True),
        ("docs/log.md#a-crash", False),
        ("docs/logs.md", False),
        ("docs/", True),
        ("docs/#events", False),
        ("#here--there", True),
        ("#here-1", True),
        ("#here-2", False),
        ("#with-docslogmd", False),
        ("#with-code-and-link", True),
        ("../outside.md", False),
        ("https://example.org/#x", True),
    ],
)
@together("way", ["[a]({})", '![a]({} "title")', "[a]: {}", '<a href="{}">'])
def test_a_link_that_leads_nowhere_is_found(link: str, leads: bool, way: str) -> None:
    page = "# Here\n## Here & there\n## Here\n## With `code` and [link](docs/log.md)\n"

    assert links.broken(ROOT / "x.md", page + way.format(link)) == ([] if leads else [link])


def test_what_stands_in_code_is_no_link() -> None:
    page = "`[a](nowhere)`\n\n```sh\n[a](nowhere)\n# nor a heading\n```\n\n    [a](nowhere)\n"

    assert not links.broken(ROOT / "x.md", page)
    assert not links.anchors(page)


def test_each_page_that_is_named_anywhere_exists() -> None:
    sources = [
        *(each for each in links.PAGES if each.name != "CHANGELOG.md"),
        *(
            path
            for folder in (
                "socketprotector",
                "client_lib",
                "exporter",
                "sample_client",
                "bench",
                "init.d",
                "tests",
                "tools",
            )
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".md", ".service", ".toml", ".c", ".h", ".sh")
        ),
    ]
    missing = {
        f"{name(path)}: {page}"
        for path in sources
        if path != Path(__file__)
        for page in NAMED.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / page).exists()
    }

    assert not missing


def test_each_page_stands_on_one_shelf() -> None:
    text = INDEX.read_text(encoding="utf-8")
    listed = re.findall(r"^\* \[[^\]]*\]\(([^)]*)\)", text, re.MULTILINE)
    here = Counter(name((INDEX.parent / each).resolve()) for each in listed)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == links.SHELVES
    assert here == Counter({*map(name, [*links.ON_THE_SITE, *links.MANUALS])} - {name(INDEX)})


def test_each_link_of_a_shelf_says_what_it_leads_to() -> None:
    links_of_shelves = re.findall(r"^\* .*$", INDEX.read_text(encoding="utf-8"), re.MULTILINE)
    without = [
        each for each in links_of_shelves if not re.fullmatch(r"\* \[[^\]]*\]\([^)]*\): \S.*", each)
    ]

    assert links_of_shelves
    assert not without
