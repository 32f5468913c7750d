"""The site of the documents in a browser: from a folder, without a server or a network.

`make test-page` builds it before.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.driver import Browser
from tests.pages import page
from tests.running import ROOT

SITE = ROOT / "build" / "site"
#: One of each kind: shelves, tables, signatures, a manual page, pictures, programs.
PAGES = [
    *("docs/index", "docs/reference", "docs/log", "client_lib/README", "docs/man/SocketProtector"),
    *("docs/metrics", "docs/comparison", "README", "client_lib/README", "ARCHITECTURE", "search"),
]


@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900), (3840, 2160)])
def test_a_page_fits_and_axe_finds_nothing(
    browser: Browser, width: int, height: int, dark: bool
) -> None:
    found = {}
    browser.looks(width, height, dark=dark, mobile=width < 500)
    for name in PAGES:
        browser.open((SITE / f"{name}.html").as_uri())
        too_wide = browser.run("return document.documentElement.scrollWidth - innerWidth")
        found[name] = [*browser.violations(), *[f"{too_wide} px"] * (too_wide > 0)]

    assert found == {name: [] for name in PAGES}


def test_its_search_finds_pages_from_a_folder(browser: Browser) -> None:
    browser.open((SITE / "search.html").as_uri() + "?q=shared+queue")
    # It lists them one after the other.
    browser.until("document.querySelector('#search-results li a[href*=why]') !== null")

    found = browser.run(
        "return [...document.querySelectorAll('#search-results li a')].map(a => a.pathname)"
    )

    assert all(Path(each).exists() for each in found)


#: Code that is wider than its column, in px; a drawing of ARCHITECTURE.md scrolls on a phone.
CUT_CODE = """
return [...document.querySelectorAll('pre')]
    .filter(pre => pre.scrollWidth > pre.clientWidth)
    .filter(pre => innerWidth > 500 || !/ARCHITECTURE/.test(location) || !pre.closest('.drawing'))
    .map(pre => pre.scrollWidth - pre.clientWidth + ' px: ' + pre.textContent.slice(0, 40))
"""
#: Options in code whose name is not in the line of its dashes; `-- COMMAND`, too.
BROKEN_OPTIONS = """
const found = [];
for (const code of document.querySelectorAll('article code, article pre, article strong')) {
    const nodes = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
    const places = [];
    while (nodes.nextNode())
        for (let at = 0; at < nodes.currentNode.data.length; ++at)
            places.push([nodes.currentNode, at]);
    const text = places.map(([node, at]) => node.data[at]).join('');
    for (const match of text.matchAll(/(?<![\\w-])-- ?\\w/g)) {
        const tops = [match.index, match.index + match[0].length - 1].map(index => {
            const range = document.createRange();
            range.setStart(places[index][0], places[index][1]);
            range.setEnd(places[index][0], places[index][1] + 1);
            return range.getClientRects()[0]?.top;
        });
        if (tops[0] !== tops[1]) found.push(text.slice(match.index, match.index + 30));
    }
}
return found
"""


def every_page() -> list[Path]:
    return sorted(SITE.rglob("*.html"))


@pytest.mark.parametrize("width", [390, 1280])
def test_code_fits_its_column_and_an_option_its_line(browser: Browser, width: int) -> None:
    found = {}
    browser.looks(width, 900, mobile=width < 500)
    for path in every_page():
        browser.open(path.as_uri())
        too_wide = browser.run("return document.documentElement.scrollWidth - innerWidth")
        found[path.name] = [
            *browser.run(CUT_CODE),
            *browser.run(BROKEN_OPTIONS),
            *[f"body: {too_wide} px"] * (too_wide > 0),
        ]

    assert found == {name: [] for name in found}


def test_a_heading_is_larger_than_those_below_it(browser: Browser) -> None:
    for width in (390, 1280):
        browser.looks(width, 900, mobile=width < 500)
        browser.open((SITE / "docs" / "reference.html").as_uri())
        sizes = browser.run(
            "return ['h1', 'h2', 'h3'].map(name => document.querySelector(`article ${name}`))"
            ".map(heading => parseFloat(getComputedStyle(heading).fontSize))"
        )

        assert sizes[0] > sizes[1] > sizes[2], (width, sizes)


def test_a_button_copies_each_program_and_nothing_else(browser: Browser) -> None:
    browser.open((SITE / "index.html").as_uri())
    browser.devtools(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    wanted = [block for block in page.blocks(ROOT / "README.md") if not block.is_picture]

    copied = browser.wait(
        "const done = arguments[0];"
        "(async () => {"
        "  const found = [];"
        "  for (const button of document.querySelectorAll('.copy')) {"
        "    button.click();"
        "    await new Promise(resolve => setTimeout(resolve, 100));"
        "    found.push([button.ariaLabel, await navigator.clipboard.readText()]);"
        "  }"
        "  done(found);"
        "})().catch(error => done(String(error)))"
    )

    assert copied == [["Copied", each.text.rstrip("\n")] for each in wanted if not each.is_text]


def test_the_front_page_is_the_first_screen_of_readme(browser: Browser) -> None:
    browser.looks(1280, 900)
    browser.open((SITE / "index.html").as_uri())
    seen = browser.run(
        "return [...document.querySelector('article').querySelectorAll('h1, p, pre, img, h2')]"
        ".filter(each => each.getBoundingClientRect().top < innerHeight)"
        ".map(each => each.tagName === 'IMG' ? each.alt : each.firstChild.textContent)"
    )

    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## ")[0]
    assert seen[0] == "SocketProtector"
    assert any(each.startswith("A server under load") for each in seen)
    for each in seen[:3]:
        assert each.strip().split("\n")[0] in text, each
