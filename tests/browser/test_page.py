"""The page in Chromium: what a viewer sees of protectors that reload, fail, come and go.

What decides is the order of events; the time from an event to the page is printed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.browser.cards import WEB, card, happened, lane, seen
from tests.browser.driver import Browser
from tests.load import Load
from tests.running import Client, Protector
from tests.scenarios.releases import COMMAND, Releases
from tests.scenarios.tools import Release, library_worker
from tests.unit.ctl.conftest import run
from tests.unit.ctl.fake import Fake, generation, health, reload, status, worker
from tests.unit.exporter.conftest import Exporter

Fakes = Callable[[str], Fake]
Starter = Callable[..., Exporter]
Protectors = Callable[..., Protector]
#: Where screenshots go: those of docs/metrics.md are made by `make test-page SHOTS=docs/images`.
SHOTS = os.environ.get("SOCKETPROTECTOR_SHOTS")
#: How long there is load before them: ten minutes fill the sparklines.
LOADED_S = float(os.environ.get("SOCKETPROTECTOR_LOADED_S", "1"))
DRAIN = "(document.querySelector('.drain:not([hidden]) p')?.textContent ?? '')"
#: From code that is not the page's own: what last words and names may have in them.
HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>&lt;b&gt;\u202e'
TAB, ENTER = "\ue004", "\ue007"
#: Phone, laptop, wall.
SIZES = ((390, 844), (1280, 900), (3840, 2160))


@pytest.fixture
def release(tmp_path: Path) -> Release:
    made = Release(tmp_path / "daemon")
    made.becomes(*library_worker("obeys", "8"))
    return made


def started(
    protector: Protectors, runtime: Path, name: str, release: Release, *more: str
) -> Protector:
    return protector(
        *("--control", runtime / f"{name}.control", "--name", name, "--workers", "4"),
        *("--log-prefix", *more, "127.0.0.1:0", "--", release.path),
    ).ready()


def watch(browser: Browser, **wanted: str) -> None:
    """Note when an expression is first true: `window.seen[name]`, in seconds since the epoch."""
    looks = "".join(
        f"if (!('{name}' in seen) && ({expression})) seen['{name}'] = Date.now() / 1000;"
        for name, expression in wanted.items()
    )
    browser.run(
        f"const seen = window.seen = {{}}; const look = () => {{ {looks} }};"
        "new MutationObserver(look).observe(document.body,"
        " {subtree: true, childList: true, attributes: true, characterData: true});"
    )


def test_a_reload_under_load_is_seen_in_its_order(
    browser: Browser, exporter: Starter, protector: Protectors, runtime: Path, release: Release
) -> None:
    web = started(protector, runtime, "web", release)
    one = exporter(*WEB, "--control", runtime / "web.control")
    seen(browser, one, "web")
    browser.until(f"{lane('web', 1)} === 'serving'")
    watch(
        browser,
        reloading=happened("reloading"),
        reloaded=happened("reloaded"),
        serving=f"{lane('web', 2)} === 'serving'",
    )
    held = Client(("127.0.0.1", web.port), "kept")
    held.hear()
    with Load(f"127.0.0.1:{web.port}") as load:
        web.reload()
        browser.until("window.seen.reloaded && window.seen.serving", "the reload on the page")
        browser.until(f"{lane('web', 1)} === 'draining'")
    browser.until(f"{DRAIN}.startsWith('1 of ')")
    assert "kept alive by worker" in browser.text(".drain:not([hidden]) p")
    held.close()
    browser.until(f"{lane('web', 1)} === undefined", "the old generation gone")

    assert load.snapshot().failures == ()
    times = browser.run("return window.seen")
    assert times["reloading"] <= times["reloaded"]
    at = browser.run(
        "return [...document.querySelectorAll('#events li')]"
        ".find(e => e.dataset.event === 'reloaded').querySelector('time').dateTime"
    )
    happened_at = datetime.fromisoformat(at).timestamp()
    for name in ("reloaded", "serving"):
        print(f"FIGURE {name}: {(times[name] - happened_at) * 1000:.0f} ms after its event")


def test_a_broken_release_shows_its_last_words_as_text(
    browser: Browser, exporter: Starter, protector: Protectors, runtime: Path, release: Release
) -> None:
    web = started(protector, runtime, "web", release)
    seen(browser, exporter(*WEB, "--control", runtime / "web.control"), "web")
    words = runtime / "words"
    words.write_text(f"Traceback\n{HOSTILE}\nno module named payments\n", encoding="utf-8")
    release.write(f"#!/bin/sh\ncat {words}\nexit 1\n")

    web.signal(signal.SIGHUP)

    browser.until("document.querySelector('.failed pre')?.textContent", "last words")
    shown = browser.text(".failed pre")
    assert "no module named payments" in shown
    assert HOSTILE.replace("\u202e", "\\u202e") in shown
    assert browser.run("return document.querySelector('.failed').open")
    assert "release 2 failed" in browser.text("#attention")
    assert browser.run("return document.querySelectorAll('img, pre *, #events script').length") == 0
    assert browser.run("return window.hit") is None
    # Even code that runs in the page cannot make elements of text: the browser refuses.
    refused = (
        "try { document.body.innerHTML = arguments[0]; return 'made' } catch (e) { return e.name }"
    )
    assert browser.run(refused, HOSTILE) == "TypeError"
    assert browser.run(f"return {lane('web', 1)}") == "serving"

    release.becomes(*library_worker("obeys", "8"))
    web.reload()
    browser.until("!document.querySelector('.failed').open", "the failure of before, closed")
    browser.until("document.querySelector('#attention').hidden")


def test_a_deploy_names_the_releases_and_a_bad_one_is_said_to_have_failed(
    browser: Browser, exporter: Starter, protector: Protectors, runtime: Path, tmp_path: Path
) -> None:
    releases, control = Releases(tmp_path / "srv"), runtime / "web.control"
    options = ("--control", control, "--name", "web", *releases.options)
    protector(*options, "127.0.0.1:0", "--", *COMMAND).ready()
    seen(browser, exporter(*WEB, "--control", control), "web")
    notes = "[...document.querySelectorAll('.lane .note')].map(n => n.textContent).join('|')"
    browser.until(f"{notes} === 'release 1'", "the release at the start")

    assert run("--control", str(control), "deploy", "2").status == 0
    browser.until(f"{notes}.split('|').includes('release 2')", "the deployed release")
    browser.until(f"{lane('web', 1)} === undefined", "the old generation gone")
    assert run("--control", str(control), "deploy", "bad").status == 3

    browser.until("document.querySelector('.failed pre')?.textContent", "last words")
    assert "no such table" in browser.text(".failed pre")
    browser.until(f"{notes} === 'release 2'", "the release that still serves, alone")


def test_dry_run_settling_and_health_are_seen(
    browser: Browser, exporter: Starter, fakes: Fakes
) -> None:
    fake = fakes("web")
    serving, tried = generation(8, "serving", worker(1)), generation(9, "starting", worker(2))
    seen(browser, exporter(*WEB, "--control", fake.path), "web")

    def happens(event: str, told: dict[str, Any]) -> None:
        fake.status = {**told, "name": "web"}
        fake.following()[-1].event(event)

    happens("dry-run", status(serving, tried, dry_run=reload(9, "running")))
    note = "[...document.querySelectorAll('.lane .note')].map(n => n.textContent).join('|')"
    browser.until(f"{note} === 'dry run: it gets no client|'")
    failed = reload(9, "failed", "exit 1; its last words:\nno such table")
    happens("dry-run-failed", status(serving, dry_run=failed))
    browser.until("document.querySelector('.tried pre')?.textContent === 'no such table'")
    assert "dry run 9 failed" in browser.text(".tried summary")
    assert browser.run("return document.querySelector('#attention').hidden")  # what serves is well
    happens("dry-run-passed", status(serving, dry_run=reload(10, "passed")))
    browser.until("document.querySelector('.tried').hidden")
    assert "dry run 10 passed" in browser.text(".where")

    new = generation(11, "settling", worker(3), settle_check="http:/healthz")
    told = status(serving, new, phase="settling", reloads=[reload(11, "running")])
    happens("route", told)
    browser.until(f"{lane('web', 8)} === 'standby' && {lane('web', 11)} === 'settling'")
    assert "--settle-check probes http:/healthz" in browser.run(f"return {note}")
    happens("unhealthy", status(health=health("unhealthy", "GET /healthz: 500")))
    browser.until("document.querySelector('#attention').textContent === 'web unhealthy'")
    assert browser.text(".notes") == "unhealthy: GET /healthz: 500"
    happens("health-unknown", status(health=health("unknown", "busy: no worker")))
    browser.until(
        "document.querySelector('.notes').textContent === 'health unknown: busy: no worker'"
    )


def test_names_and_status_texts_are_text_too(
    browser: Browser, exporter: Starter, fakes: Fakes
) -> None:
    fake = fakes("web")
    hostile = {"name": HOSTILE, "version": HOSTILE, "phase": HOSTILE}
    fake.status = status(
        generation(8, "serving", worker(1, status=HOSTILE, state=HOSTILE), path=HOSTILE), **hostile
    )
    browser.open(f"{exporter(*WEB, '--control', fake.path).page}/")
    browser.until("document.querySelector('.lane')")
    fake.following()[0].event(HOSTILE, reason=HOSTILE, generation=HOSTILE)
    browser.until("document.querySelector('#events li')")
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.until("document.querySelector('td')")

    assert browser.text(".name").startswith("<img src=x")
    assert browser.run("return document.querySelectorAll('img, body script').length") == 0
    assert browser.run("return window.hit") is None


@pytest.fixture
def hundred(fakes: Fakes) -> list[Fake]:
    made = [fakes(f"shop-{number:02}") for number in range(100)]
    for number, each in enumerate(made):
        workers = [worker(place, active=place % 2) for place in range(4)]
        busy = {"active": 12345, "queue": 278}
        each.status["generations"] = [generation(8, "serving", *workers, **busy)]
        if number % 10 == 3:
            old = [worker(9, active=3), worker(10, active=0)]
            each.status["generations"].append(generation(7, "draining", *old, **busy))
    made[42].status["reloads"] = [reload(9, "failed", "exit 1; its last words:\nno such table")]
    return made


def test_a_hundred_instances_are_found_by_name_and_by_trouble(
    browser: Browser, exporter: Starter, hundred: list[Fake]
) -> None:
    one = exporter(*WEB)
    browser.open(f"{one.page}/")
    browser.until("document.querySelectorAll('.card .lane').length >= 110", "all of them")

    names = browser.run("return [...document.querySelectorAll('.name')].map(n => n.textContent)")
    # Others may run on this machine, in /run.
    ours = [each for each in names if each.startswith("shop-")]
    assert ours == [f"shop-{number:02}" for number in range(100)]
    assert names == sorted(names)
    assert f"{len(names)} instances" in browser.text("#summary")
    link = f'document.querySelector(`[href="#${{({card("shop-42")}).id}}"]`)'
    assert browser.run(f"return {link}.textContent") == "shop-42 release 9 failed"
    browser.run(f"{link}.click()")
    focused = "return document.activeElement.querySelector('.name')?.textContent"
    assert browser.run(focused) == "shop-42"
    browser.run("document.querySelector('#filter').focus()")
    browser.keys(*"shop-07")
    shown = "[...document.querySelectorAll('.card')].filter(c => !c.hidden).length"
    browser.until(f"{shown} === 1")

    hundred[7].end()
    browser.until(f"({card('shop-07')}).dataset.phase === 'silent'")


def test_an_exporter_that_is_started_again_is_found_again(
    browser: Browser, exporter: Starter, fakes: Fakes, free_port: Callable[[], int]
) -> None:
    fake, where = fakes("web"), f"127.0.0.1:{free_port()}"
    first = exporter("--web", where)
    seen(browser, first, "web")
    browser.until("document.querySelector('#link').textContent === 'live'")
    fake.following()[0].event("reloading")
    browser.until(happened("reloading"))

    assert first.end() == 0
    browser.until("document.querySelector('#link').dataset.link === 'lost'")
    assert "trying again" in browser.text("#link")
    fake.status["restarts"] = 7
    exporter("--web", where)

    browser.until("document.querySelector('#link').textContent === 'live'")
    browser.until(f"({card('web')}).textContent.includes('7 restarts')")
    fake.following()[-1].event("reloaded", generation=9)
    browser.until(happened("reloaded"))
    assert browser.run(f"return {happened('reloading')}")  # of before


def test_a_connection_that_ends_silently_is_made_again(
    browser: Browser, exporter: Starter, fakes: Fakes
) -> None:
    fake = fakes("web")
    seen(browser, exporter(*WEB, "--control", fake.path), "web")

    browser.run("window.before = source")
    # As after half a minute, in which the page heard nothing.
    browser.until("(source === window.before && (heard -= 30_000), source !== window.before)")
    assert browser.run("return window.before.readyState === EventSource.CLOSED")

    browser.until("document.querySelector('#link').textContent === 'live'")
    fake.following()[-1].event("reloaded", generation=9)
    browser.until(happened("reloaded"))


def test_over_a_slow_network_the_page_waits_longer_each_time(
    browser: Browser, exporter: Starter, fakes: Fakes
) -> None:
    """Otherwise it would never show a start of which one message takes longer than 20 seconds."""
    seen(browser, exporter(*WEB, "--control", fakes("web").path), "web")
    browser.run(
        """window.before = source;
        window.made = [];
        window.EventSource = class {
            static OPEN = 1;
            readyState = 1;
            addEventListener() {}
            close() { this.readyState = 2; }
            constructor() { made.push(this); heard = Date.now(); }
        };"""
    )
    browser.until("(source === window.before && (heard -= 30_000), made.length === 1)")

    browser.run("heard -= 30_000; window.ticks = 0; setInterval(() => (ticks += 1), 1000)")
    browser.until("ticks >= 2")
    assert browser.run("return made.length") == 1
    browser.run("heard -= 15_000")
    browser.until("made.length === 2")


def test_events_from_before_the_page_was_opened_are_not_announced(
    browser: Browser, exporter: Starter, fakes: Fakes
) -> None:
    fake = fakes("web")
    one = exporter(*WEB, "--control", fake.path)
    seen(browser, one, "web")
    fake.following()[-1].event("reload-failed", reason="why", generation=2)
    browser.until("document.querySelector('#said').textContent.startsWith('web: reload-failed')")

    seen(browser, one, "web")
    browser.until(happened("reload-failed"))
    assert browser.text("#said") == ""


def test_everything_is_reached_by_keys(browser: Browser, exporter: Starter, fakes: Fakes) -> None:
    fake = fakes("web")
    fake.status["reloads"] = [reload(9, "failed", "exit 1; its last words:\nno such table")]
    seen(browser, exporter(*WEB, "--control", fake.path), "web")
    browser.until("!document.querySelector('.failed').hidden")
    browser.run("document.activeElement.blur()")
    reached = []
    for _ in range(12):
        browser.keys(TAB)
        reached.append(
            browser.run(
                "const e = document.activeElement ?? document.body; const near = e.parentElement;"
                "return e.id || e.className || [e.tagName.toLowerCase(), near.className ||"
                " near.closest('[id]')?.id].join(' ')"
            )
        )
        if reached[-1] == "summary workers":
            browser.keys(ENTER)
            browser.until("document.querySelector('td')?.textContent === '14'", "the table")

    wanted = ["skip", "filter", "a attention", "summary workers", "summary verdict failed"]
    wanted.append("pre verdict failed")
    places = [next((n for n, each in enumerate(reached) if each == w), None) for w in wanted]
    assert None not in places, reached
    assert places == sorted(places)  # type: ignore[type-var]
    assert "events" in reached


@pytest.mark.parametrize(("width", "height"), SIZES[1:])
def test_many_generations_that_drain_fit_on_a_screen(
    browser: Browser, exporter: Starter, fakes: Fakes, width: int, height: int
) -> None:
    fake = fakes("web")
    browser.looks(width, height)
    seen(browser, exporter(*WEB, "--control", fake.path), "web")
    old = [generation(number, "draining", worker(number)) for number in range(1, 60)]
    fake.status = {**status(*old, generation(60, "serving", worker(60))), "name": "web"}
    fake.following()[-1].event("drained")

    browser.until("document.querySelector('.more').textContent.startsWith('and 55 older')")
    assert browser.run("return document.querySelector('.card').offsetHeight") <= height


@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_axe_finds_nothing(
    browser: Browser, exporter: Starter, hundred: list[Fake], width: int, height: int, dark: bool
) -> None:
    chosen = ("--control", hundred[3].path, "--control", hundred[42].path)
    for words, cards in (((*WEB, *chosen), 2), (WEB, 100)):
        one = exporter(*words)
        browser.looks(width, height, dark=dark, mobile=width < 500)
        browser.open(f"{one.page}/")
        browser.until(f"document.querySelectorAll('.card .lane').length >= {cards}")
        browser.run("document.querySelector('.workers').open = true")
        hundred[3].following()[-1].event("reload-failed", reason="why", generation=2)
        browser.until("document.querySelector('#events li')")
        browser.devtools("Page.setBypassCSP", enabled=True)
        assert browser.violations() == []
        overflow = (
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert browser.run(overflow) == 0
        fits = "[...document.querySelectorAll('.card')].every(c => c.scrollWidth <= c.clientWidth)"
        assert browser.run(f"return {fits}")
        one.end()


def test_screenshots(
    browser: Browser,
    exporter: Starter,
    protector: Protectors,
    runtime: Path,
    tmp_path: Path,
) -> None:
    """A reload that drains beside a broken one, in each size and scheme."""
    folder = Path(SHOTS) if SHOTS else tmp_path
    folder.mkdir(exist_ok=True)
    names = ("api", "shop", "web")
    sockets = [runtime / f"{name}.control" for name in names]
    with ExitStack() as opened:
        # What is seen of the paths says nothing of who made the pictures.
        place = Path(opened.enter_context(TemporaryDirectory(prefix="app-")))
        releases = [Release(place / name) for name in names]
        for each in releases:
            each.becomes(*library_worker("obeys", "8"))
        api, shop, _ = (
            started(protector, runtime, name, each)
            for name, each in zip(names, releases, strict=True)
        )
        one = exporter(*WEB, *(word for path in sockets for word in ("--control", path)))
        for served, rate in ((shop, 60.0), (api, 25.0)):
            opened.enter_context(Load(f"127.0.0.1:{served.port}", rate_per_s=rate))
        clients = [Client(("127.0.0.1", shop.port), "kept") for _ in range(9)]
        for client in clients:
            client.hear()
            opened.callback(client.close)
        time.sleep(LOADED_S)  # for sparklines that have something to show; it decides nothing
        seen(browser, one, *names)
        shop.reload()
        browser.until(f"{lane('shop', 1)} === 'draining'")
        for client in clients[:5]:
            client.close()
        releases[0].write(BROKEN)
        api.signal(signal.SIGHUP)
        browser.until("document.querySelector('.failed pre')?.textContent", "last words")
        browser.until(f"{DRAIN}.startsWith('4 of ')")
        for width, height in ((390, 1100), (1280, 800), (3840, 2160)):
            for dark in (True, False):
                browser.looks(width, height, dark=dark, mobile=width < 500)
                path = folder / f"page-{width}-{'dark' if dark else 'light'}.webp"
                browser.shot(path)
                assert 5_000 < path.stat().st_size < 300_000
                browser.shot(tmp_path / path.with_suffix(".png").name)


BROKEN = r"""#!/bin/sh
cat <<'END'
Traceback (most recent call last):
  File "/srv/api/app.py", line 12, in <module>
    from payments import gateway
ModuleNotFoundError: No module named 'payments'
END
exit 1
"""
