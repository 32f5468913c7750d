"""The site of the documents in a browser: from a folder, without a server or a network.

`make test-page` builds it before.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.driver import Browser
from tests.running import ROOT

SITE = ROOT / "build" / "site"
#: One of each kind: shelves, tables, signatures, a manual page, pictures, programs.
PAGES = [
    *("docs/index", "docs/reference", "docs/log", "docs/client-api", "docs/man/SocketProtector"),
    *("docs/page", "docs/comparison", "README", "client_lib/README", "ARCHITECTURE", "search"),
]


@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900), (3840, 2160)])
def test_a_page_fits_and_axe_finds_nothing(
    browser: Browser, width: int, height: int, dark: bool
) -> None:
    found = {}
    browser.looks(width, height, dark=dark, mobile=width < 500)
    for page in PAGES:
        browser.open((SITE / f"{page}.html").as_uri())
        too_wide = browser.run("return document.documentElement.scrollWidth - innerWidth")
        found[page] = [*browser.violations(), *[f"{too_wide} px"] * (too_wide > 0)]

    assert found == {page: [] for page in PAGES}


def test_its_search_finds_pages_from_a_folder(browser: Browser) -> None:
    browser.open((SITE / "search.html").as_uri() + "?q=shared+queue")
    # It lists them one after the other.
    browser.until("document.querySelector('#search-results li a[href*=why]') !== null")

    found = browser.run(
        "return [...document.querySelectorAll('#search-results li a')].map(a => a.pathname)"
    )

    assert all(Path(each).exists() for each in found)


def test_the_folder_opens_at_the_shelves(browser: Browser) -> None:
    browser.open((SITE / "index.html").as_uri())
    # That page itself has none.
    browser.until("document.querySelector('h1')?.textContent.includes('Documentation')")

    assert browser.run("return location.pathname").endswith("/docs/index.html")
