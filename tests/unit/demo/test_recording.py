"""README's picture: drawn from the recording, and what it shows is what was recorded.

That the recording shows what the demo says: tests/scenarios/test_demo.py.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from tests.pages.recording import lines_of, of_cast
from tests.running import ROOT

IMAGES = ROOT / "docs" / "images"
SVG = IMAGES / "demo.svg"
_TEXT = "{http://www.w3.org/2000/svg}text"


@pytest.fixture(scope="module")
def drawn() -> set[str]:
    """The lines that the picture shows at any time."""
    lines = {}
    for group in ElementTree.parse(SVG).iter("{http://www.w3.org/2000/svg}g"):
        if group.get("id"):
            lines[group.get("id")] = "".join(each.text or "" for each in group.iter(_TEXT))
    return {line.rstrip() for line in lines.values()}


def test_it_shows_each_line_that_was_recorded_and_no_other(drawn: set[str]) -> None:
    stay, all_of_them = lines_of(of_cast(IMAGES / "demo.cast"))

    assert set(stay) <= drawn
    assert drawn <= all_of_them


def test_it_ends_with_no_failure_for_six_seconds() -> None:
    text = SVG.read_text(encoding="utf-8")
    stay, _ = lines_of(of_cast(IMAGES / "demo.cast"))

    assert any(
        re.fullmatch(r"[\d,]+ connections, 0 failed(, \d+ cut by our kill -9)?", each)
        for each in stay[-5:]
    )
    duration_ms = re.search(r"--animation-duration: (\d+)ms", text)
    shown = re.findall(r"([\d.]+)%\{transform:translateY\((-?\d+)px\)", text)
    assert duration_ms
    last = min(float(share) for share, place in shown if place == shown[-1][1])
    assert (100 - last) / 100 * int(duration_ms[1]) >= 5999


def test_it_is_small_and_asks_nobody_for_anything() -> None:
    text = SVG.read_text(encoding="utf-8")

    assert SVG.stat().st_size < 30_000
    assert "<script" not in text
    assert set(re.findall(r'href="([^#][^"]*)', text)) == set()
    assert "url(" not in text


def test_neither_has_a_path_of_the_machine_that_made_it() -> None:
    for name in ("demo.cast", "demo.svg"):
        text = (IMAGES / name).read_text(encoding="utf-8")
        paths = re.findall(r"(?<![\w:/])/[a-z][\w.-]*/[\w./-]+", text)
        assert all(re.match(r"/tmp/socketprotector-demo-|/bin/sh", each) for each in paths), paths
