"""A browser for all tests here, and the exporter that it looks at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.browser.driver import Browser
from tests.unit.exporter.conftest import exporter, fakes, runtime

__all__ = ["browser", "exporter", "fakes", "runtime"]


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A window of a phone's or a screen's size: looks() says which."""
    if shutil.which("chromedriver") is None:
        pytest.fail("there is no chromedriver(1): apt-get install chromium chromium-driver")
    made = Browser()
    try:
        made.looks(1280, 900)
        yield made
    finally:
        made.close()
