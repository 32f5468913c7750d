"""Finds cards, lanes and events on the page, as JavaScript expressions."""

from __future__ import annotations

import json

from tests.browser.driver import Browser
from tests.unit.exporter.conftest import Exporter

WEB = ("--web", "127.0.0.1:0")


def card(name: str) -> str:
    """An expression: the card of an instance."""
    return (
        "[...document.querySelectorAll('.card')]"
        f".find(c => c.querySelector('.name').textContent === {json.dumps(name)})"
    )


def lane(name: str, number: int) -> str:
    """An expression: the phase of a generation of an instance, as the page shows it."""
    return (
        f"[...({card(name)})?.querySelectorAll('.lane') ?? []].find(l => "
        f"l.querySelector('.number').textContent === 'generation {number}')?.dataset.phase"
    )


def happened(event: str, name: str = "") -> str:
    """An expression: whether the list of events has one of these."""
    row = "e.closest('.row').querySelector('bdi').textContent"
    of = f" && {row} === {json.dumps(name)}" if name else ""
    is_one = f"e.dataset.event === {json.dumps(event)}{of}"
    return f"[...document.querySelectorAll('#events li')].some(e => {is_one})"


def seen(browser: Browser, exporter: Exporter, *names: str) -> None:
    """Open the page, and wait for these instances."""
    browser.open(f"{exporter.page}/")
    for name in names:
        browser.until(f"({card(name)})?.querySelector('.lane')", f"{name} on the page")
