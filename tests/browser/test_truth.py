"""The page shows what is so: nothing old as new, nothing unknown as 0, no error out of sight."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.cards import WEB, card, seen
from tests.browser.driver import Browser
from tests.unit.ctl.fake import Fake, generation, listener, reload, status, worker
from tests.unit.exporter.conftest import Exporter

Fakes = Callable[[str], Fake]
Starter = Callable[..., Exporter]
ERROR = "ModuleNotFoundError: No module named 'payments'"
#: As a server that accepts by itself and does not count.
UNCOUNTED: dict[str, Any] = {"accepted": None, "finished": None, "errors": None, "wait_us": None}
#: The colour of what is no longer so.
QUIET = "getComputedStyle(document.querySelector('aside h2')).color"


def colour(name: str, selector: str) -> str:
    """An expression: the colour of a part of a card."""
    return f"getComputedStyle(({card(name)}).querySelector('{selector}')).color"


def texts(name: str, selector: str) -> str:
    """An expression: the texts of all parts of a card that are seen."""
    return (
        f"[...({card(name)}).querySelectorAll('{selector}')]"
        ".filter(e => e.checkVisibility()).map(e => e.textContent)"
    )


def later(browser: Browser, seconds: int) -> None:
    """Let the page's clock go forward, and run what is due each second."""
    browser.run(f"const now = Date.now; Date.now = () => now() + {1000 * seconds}")
    browser.wait("setTimeout(arguments[0], 1100)")


@pytest.fixture
def page(browser: Browser, exporter: Starter) -> Callable[..., Exporter]:
    """Show these instances."""

    def open_it(*instances: Fake) -> Exporter:
        one = exporter(*WEB, *(word for each in instances for word in ("--control", each.path)))
        seen(browser, one, *(each.path.stem for each in instances))
        return one

    return open_it


Page = Callable[..., Exporter]


def test_the_end_of_last_words_is_seen_and_the_last_line_twice(
    browser: Browser, fakes: Fakes, page: Page
) -> None:
    web = fakes("web")
    trace = "".join(f'  File "app.py", line {n}, in <module>\n' for n in range(80))
    reason = f"./daemon exited with status 1; its last words:\n{trace}{ERROR}\n\n"
    web.status["reloads"] = [reload(9, "failed", reason)]
    page(web)

    assert browser.run(f"return {texts('web', '.failed .last')}") == [ERROR]

    def end_is_seen() -> bool:
        return bool(
            browser.run(
                "const pre = document.querySelector('.failed pre'), range = new Range();"
                "range.setStart(pre.firstChild, pre.textContent.length - 1);"
                "range.setEnd(pre.firstChild, pre.textContent.length);"
                "const end = range.getBoundingClientRect(), box = pre.getBoundingClientRect();"
                "return end.top >= box.top && end.bottom <= box.bottom + 1"
                " && pre.scrollHeight > pre.clientHeight"
            )
        )

    assert end_is_seen()
    browser.run("document.querySelector('.failed').open = false")
    browser.run("document.querySelector('.failed').open = true")
    assert end_is_seen()


def test_what_is_unknown_is_absent_and_not_0(browser: Browser, fakes: Fakes, page: Page) -> None:
    web, counted = fakes("web"), fakes("counted")
    of = generation(8, "serving", worker(1, accepted=None, active=None), **UNCOUNTED)
    web.status |= status(of, name="web", forwarded=None, lost=None, queue_limit=None)
    page(web)
    sums = "document.querySelector('#summary').textContent"
    assert browser.run(f"return {sums}") == "1 instance1 serving"

    page(web, counted)
    browser.until(f"{sums}.includes('connections/s')")
    assert "0 connections/s in 1 of them" in browser.run(f"return {sums}")
    for selector, wanted in {
        ".figures dt": ["active"],
        ".figures b": ["3"],
        ".numbers span": ["queue"],
        ".unknown": [
            "Unknown: connections/s and waits. Only workers with the client library count them."
        ],
    }.items():
        assert browser.run(f"return {texts('web', selector)}") == wanted
    assert browser.run(f"return {texts('counted', '.unknown')}") in ([], [""])


def test_with_one_generation_its_figures_are_shown_once(
    browser: Browser, fakes: Fakes, page: Page
) -> None:
    web = fakes("web")
    page(web)
    each = "conn/s active queue wait p50 wait p99"
    shown = f"{texts('web', '.numbers span')}.join(' ')"
    assert browser.run(f"return {shown}") == "queue wait p50"
    web.status["generations"].append(generation(7, "draining", worker(3)))
    web.following()[0].event("reloaded")
    browser.until(f"{shown} === '{each} {each}'")


def test_a_wait_is_the_end_of_a_range(browser: Browser, fakes: Fakes, page: Page) -> None:
    page(fakes("web"))
    waits = [None, 63, 131_071, 2**31 - 1]
    words = browser.run("return arguments[0].map(wait)", waits)
    assert words == ["\u2013", "≤ 63 µs", "≤ 131 ms", "> 1,073 s"]


def test_a_killed_protector_is_grey_and_its_clocks_stand(
    browser: Browser, fakes: Fakes, page: Page
) -> None:
    web, other = fakes("web"), fakes("other")
    page(web, other)
    web.end()
    browser.until(f"({card('web')}).dataset.phase === 'silent'")

    assert browser.run(
        f"return {texts('web', '.old')}[0].endsWith('; its workers may still serve.')"
    )
    assert browser.run(f"return {texts('web', '.lane .phase')}") == ["was serving"]
    assert browser.run(f"return {colour('web', '.lane .phase')} === {QUIET}")
    assert browser.run(f"return {colour('other', '.lane .phase')} !== {QUIET}")
    ages = f"[{texts('web', '.where, .age')}, {texts('other', '.age')}].flat()"
    before = browser.run(f"return {ages}")
    # In one script: a message of the exporter would set the page's clock right again.
    after = browser.run(
        "const now = Date.now; Date.now = () => now() + 864_000_000;"
        f"document.querySelectorAll('[data-since]').forEach(age); return {ages}"
    )
    assert after[:2] == before[:2]
    assert after[2] != before[2]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "suspended"])
def test_without_the_exporter_all_is_grey_and_clocks_stand(
    browser: Browser, fakes: Fakes, page: Page, how: signal.Signals
) -> None:
    one = page(fakes("web"))
    assert browser.run(f"return {colour('web', '.lane .phase')} !== {QUIET}")
    browser.until("document.querySelector('#link').textContent === 'live'")

    one.process.send_signal(how)
    try:
        if how == signal.SIGSTOP:
            later(browser, 30)  # no connection ends
        browser.until("document.querySelector('#link').dataset.link === 'lost'")
        age = texts("web", ".where, .age")
        before = browser.run(f"return {age}")
        later(browser, 10 * 86_400)
        assert browser.run(f"return {age}") == before
        for selector in (".lane .phase", ".head .phase", ".figures b"):
            assert browser.run(f"return {colour('web', selector)} === {QUIET}"), selector
        assert "trying again" in browser.text("#link")
    finally:
        one.process.send_signal(signal.SIGCONT)
    if how == signal.SIGSTOP:
        browser.until("document.querySelector('#link').dataset.link === 'live'")
        assert browser.run(f"return {colour('web', '.lane .phase')} !== {QUIET}")


def test_a_stopped_instance_stays_and_is_no_trouble(
    browser: Browser, fakes: Fakes, page: Page, exporter: Starter
) -> None:
    web = fakes("web")
    seen(browser, exporter(*WEB), "web")
    web.following()[0].event("stopped")
    web.end()
    web.path.unlink()
    browser.until(f"({card('web')}).dataset.phase === 'stopped'")
    fakes("next")
    browser.until(f"({card('next')})?.querySelector('.lane')", "the folder looked at again")

    assert browser.run(f"return {texts('web', '.old')}[0].startsWith('Stopped at ')")
    assert browser.run(f"return {texts('web', '.lane')}") == []
    assert "1 stopped" in browser.text("#summary")
    attention = browser.run("return document.querySelector('#attention').textContent")
    assert "web" not in attention.split()


def test_a_release_is_one_row_that_says_the_worst_of_it(
    browser: Browser, fakes: Fakes, page: Page
) -> None:
    web = fakes("web")
    page(web)
    line = web.following()[0]
    line.event("reloading")
    line.event("spawned", generation=9, worker=15, slot=0, pid=77)
    failed = {"generation": 9, "reason": "exited with status 1", "last_words": f"trace\n{ERROR}\n"}
    line.send({"v": 1, "event": "reload-failed", "at": 180.0, "level": "error", **failed})
    line.event("signalled", worker=15, signal="TERM")
    line.event("exited", generation=9, worker=15)
    line.event("drained", generation=9)
    line.event("route", generation=8)
    browser.until("document.querySelectorAll('#events .row').length === 2")

    rows = "[...document.querySelectorAll('#events .row')]"
    assert browser.run(f"return {rows}.map(r => r.dataset.event)") == ["route", "reload-failed"]
    said = browser.run(f"return {rows}[1].querySelector('summary').textContent")
    assert "web generation 9 reload-failed" in " ".join(
        browser.run(
            f"return [...{rows}[1].querySelector('summary').children].map(e => e.textContent)"
        )
    )
    assert said.endswith(ERROR)
    listed = browser.run(f"return [...{rows}[1].querySelectorAll('li')].map(e => e.dataset.event)")
    assert listed == ["drained", "exited", "signalled", "reload-failed", "spawned", "reloading"]
    assert not browser.run(f"return {rows}[1].querySelector('li').checkVisibility()")
    browser.run(f"{rows}[1].querySelector('summary').click()")
    assert browser.run(f"return {rows}[1].querySelector('li').checkVisibility()")


def test_a_time_that_no_date_can_say_stops_nothing(
    browser: Browser, fakes: Fakes, page: Page
) -> None:
    web = fakes("web")
    page(web)
    # As no exporter sends it: the page must not depend on that.
    told = {"id": "x", "name": "web", "level": "info", "event": "odd", "text": "", "last": ""}
    browser.run("tell(arguments[0], true)", {**told, "at": 1e300, "generation": 0})
    browser.run("return [when(1e300), clock(-1e300)]")
    web.following()[0].send({"v": 1, "event": "odder", "at": 1e300, "level": "info"})
    web.following()[0].event("held")
    browser.until("document.querySelector('#events [data-event=held]')")
    assert browser.run("return document.querySelectorAll('#events .row').length") == 3


def test_a_young_sparkline_is_as_wide_as_its_time(
    browser: Browser, fakes: Fakes, page: Page
) -> None:
    page(fakes("web"))
    line = "document.querySelectorAll('.figures svg')[1].querySelector('.line').getBBox()"
    browser.until(f"{line}.width > 0", "what is known")
    box = browser.run(f"const b = {line}; return [b.x, b.width]")
    # Of 120 steps of 5 s; the exporter has run for a few of them.
    assert box[1] <= 12
    assert box[0] + box[1] == pytest.approx(120, abs=1.1)
    ground = "document.querySelectorAll('.figures svg')[1].querySelector('.ground')"
    assert browser.run(f"return {ground}.getBBox().width") >= 119


def test_cells_say_that_they_can_be_opened_and_only_then(
    browser: Browser, fakes: Fakes, page: Page
) -> None:
    web = fakes("web")
    web.status["generations"].append(generation(9, "abandoned"))
    page(web)
    assert browser.run(f"return {texts('web', '.workers .size')}") == ["1 worker"]
    size = "document.querySelector('.workers:not([hidden]) .size')"
    after = f"getComputedStyle({size}, '::after').content"
    closed = browser.run(f"return {after}")
    assert closed not in ("none", "normal")
    browser.run("document.querySelector('.workers:not([hidden]) summary').click()")
    browser.until(f"{after} !== {json.dumps(closed)}")


def test_there_is_no_hole_beside_a_tall_card(browser: Browser, fakes: Fakes, page: Page) -> None:
    made = [fakes(f"shop-{place}") for place in range(4)]
    words = "\n".join(map(str, range(90)))
    made[1].status["reloads"] = [reload(9, "failed", f"exit 1; its last words:\n{words}")]
    made[0].status["listeners"] = [listener()]
    browser.looks(1280, 900)
    page(*made)

    def gaps() -> list[float]:
        """Return how much room is left below each card, to the next one in its column."""
        found = browser.run(
            "const cards = [...document.querySelectorAll('.card')];"
            "const boxes = cards.map(c => c.getBoundingClientRect());"
            "return boxes.map(b => Math.min(...boxes.filter(o => Math.abs(o.left - b.left) < 2"
            " && o.top > b.top).map(o => o.top - b.bottom))).filter(Number.isFinite)"
        )
        return [float(each) for each in found]

    browser.until("document.querySelectorAll('.card').length === 4")
    assert len(gaps()) == 2
    assert all(5 <= each < 24 for each in gaps()), gaps()
    browser.run("document.querySelector('.failed').open = false")
    browser.wait("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert all(5 <= each < 24 for each in gaps()), gaps()
