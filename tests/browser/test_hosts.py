"""Other hosts in Chromium: a cell for each, reached by keys, read by a screen reader."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser.driver import Browser
from tests.unit.ctl.fake import Fake
from tests.unit.exporter.conftest import Exporter

Starter = Callable[..., Exporter]
SIZES = ((390, 844), (1280, 900), (3840, 2160))
RIGHT, DOWN, HOME, END = "\ue014", "\ue015", "\ue011", "\ue010"
HOSTILE = "<img src=x onerror='window.hit=1'>"


def metrics(name: str = "web", **values: float) -> str:
    """What an exporter answers of an instance that serves, or not."""
    all_values = {"up": 1, "serving": 1, "connections_active": 7, **values}
    return "".join(
        f'socketprotector_{metric}{{instance="{name}"}} {value}\n'
        for metric, value in all_values.items()
    )


class Fleet(ThreadingHTTPServer):
    """Exporters of many hosts: each has a path, and answers it with what is in `told`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        super().__init__(("127.0.0.1", 0), _Answer)

    def lists(self, file: Path) -> None:
        where = f"http://127.0.0.1:{self.server_address[1]}"
        file.write_text("".join(f"{name} {where}/{name}\n" for name in self.told))


class _Answer(BaseHTTPRequestHandler):
    server: Fleet

    def do_GET(self) -> None:
        told = self.server.told.get(self.path[1:])
        self.send_response(200 if told is not None else 404)
        self.end_headers()
        self.wfile.write((told or "").encode())

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Fleet() as made:
        serving = threading.Thread(target=made.serve_forever)
        serving.start()
        yield made
        made.shutdown()
        serving.join()


@pytest.fixture
def page(
    browser: Browser,
    exporter: Starter,
    fakes: Callable[[str], Fake],
    fleet: Fleet,
    tmp_path: Path,
) -> Callable[[int], None]:
    """Open the page with so many hosts, some of them in trouble."""

    def open_it(count: int) -> None:
        fleet.told = {f"web-{number:02}": metrics() for number in range(count)}
        fleet.told["web-03"] = metrics("shop", held=1)
        fleet.told["web-04"] = metrics(HOSTILE, last_reload_successful=0) + metrics()
        fleet.told["web-05"] = "<html>"
        fleet.lists(tmp_path / "hosts")
        web = fakes("web")
        words = ("--web", "127.0.0.1:0", "--control", web.path, "--peers", tmp_path / "hosts")
        browser.open(f"{exporter(*words).page}/")
        browser.until(f"document.querySelectorAll('.host').length === {count}")
        browser.until("!document.querySelector('.host[data-tone=wait]')", "an answer of each")
        browser.until("document.querySelector('.card .lane')")

    return open_it


def cell(name: str) -> str:
    """An expression: what a screen reader says of a host."""
    return (
        "[...document.querySelectorAll('.host')]"
        f".find(h => h.querySelector('.name').textContent === {json.dumps(name)})"
        ".getAttribute('aria-label')"
    )


FOCUSED = "document.activeElement.querySelector('.name')?.textContent"


def test_a_host_is_a_cell_with_its_state_in_words(
    browser: Browser, page: Callable[[int], None], fleet: Fleet
) -> None:
    page(100)
    assert browser.run(f"return {cell('web-00')}") == "web-00, serving, 1 instance · 7 active"
    assert browser.run(f"return {cell('web-03')}").startswith("web-03, holding, shop, 1 instance")
    assert browser.run(f"return {cell('web-04')}").startswith(
        f"web-04, reload failed, {HOSTILE}, 2"
    )
    assert browser.run(f"return {cell('web-05')}") == (
        "web-05, not answering, sends no metrics of ours"
    )
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.run("return window.hit") is None
    assert "97 serving" in browser.text("#hosts-summary")
    # Not by colour alone.
    shapes = {
        browser.run(
            "const i = document.querySelector(`.host[data-tone=${arguments[0]}] i`);"
            "return getComputedStyle(i, '::before').content",
            tone,
        )
        for tone in ("good", "warn", "bad")
    }
    assert len(shapes) == 3

    fleet.told["web-03"] = metrics("shop")
    del fleet.told["web-07"]
    browser.until(f"{cell('web-03')}.startsWith('web-03, serving')")
    browser.until(f"{cell('web-07')} === 'web-07, not answering, answers 404'")
    fleet.told["web-07"] = metrics()
    browser.until(f"{cell('web-07')}.startsWith('web-07, serving')")


def test_hosts_are_reached_by_keys_and_by_name(
    browser: Browser, page: Callable[[int], None]
) -> None:
    page(100)
    trouble = "[...document.querySelectorAll('#attention a')].map(a => a.textContent)"
    assert browser.run(f"return {trouble}") == [
        "web-03 holding", "web-04 reload failed", "web-05 not answering"
    ]  # fmt: skip
    browser.run("document.querySelectorAll('#attention a')[1].click()")
    assert browser.run(f"return {FOCUSED}") == "web-04"

    assert browser.run("return document.querySelectorAll('.host[tabindex=\"0\"]').length") == 1
    browser.keys(RIGHT)
    assert browser.run(f"return {FOCUSED}") == "web-05"
    browser.keys(HOME, DOWN)
    above, below = browser.run(
        "const cells = [...document.querySelectorAll('.host')];"
        "return [cells[0], document.activeElement].map(c => [c.offsetLeft, c.offsetTop])"
    )
    assert above[0] == below[0]
    assert above[1] < below[1]
    browser.keys(END)
    assert browser.run(f"return {FOCUSED}") == "web-99"

    browser.run("document.querySelector('#filter').focus()")
    browser.keys(*"web-07")
    browser.until("[...document.querySelectorAll('.host')].filter(h => !h.hidden).length === 1")
    one = "document.querySelector('.host[tabindex=\"0\"] .name').textContent"
    assert browser.run(f"return {one}") == "web-07"


@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("count", [8, 100])
def test_axe_finds_nothing_and_all_cells_fit(
    browser: Browser, page: Callable[[int], None], count: int, width: int, height: int, dark: bool
) -> None:
    browser.looks(width, height, dark=dark, mobile=width < 500)
    page(count)
    browser.run("document.querySelectorAll('#attention a')[1].click()")
    browser.devtools("Page.setBypassCSP", enabled=True)

    assert browser.violations() == []
    assert browser.run("return document.documentElement.scrollWidth") <= width
    boxes = browser.run(
        "const names = [...document.querySelectorAll('.host .name')];"
        "return names.map(n => n.scrollWidth - n.clientWidth)"
    )
    assert max(boxes) <= 0, "a name is cut"
