"""Renders a status: the heading, and the columns of `status` and `top` (of `list`: queries.py)."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ..model.text import headline
from . import render
from .client import Message
from .fields import listed, number_in, text_in
from .render import Row

_GENERATIONS = (
    *("GEN", "PHASE", "AGE", "READY", "QUEUE", "ACTIVE", "ACCEPTED", "ERRORS", "LOST"),
    *("WAIT-P50", "P99"),
)
_WORKERS = ("WORKER", "GEN", "PID", "STATE", "AGE", "ACTIVE", "ACCEPTED", "ERRORS", "SAYS")
_WORDS = {"PHASE", "STATE", "SAYS"}


def heading(status: Message) -> list[Text]:
    """The protector itself: what it does, and since when."""
    now = status.get("now")
    words = [
        f" pid {status.get('pid')}, version {status.get('version')}, "
        f"up {render.duration_text(render.seconds_since(now, status.get('started_at')))}"
    ]
    if restarts := number_in(status, "restarts"):
        words.append(render.several(restarts, "restart"))
    if status.get("guarded") is True:
        words.append("guarded")
    name = Text(str(render.cell(text_in(status, "name"))), style="bold")
    phase = render.cell(text_in(status, "phase"))
    first = Text.assemble(name, ": ", phase, ",", render.cell(", ".join(words)))
    found = [first]
    held_s = status.get("held_s")
    if isinstance(held_s, int | float):
        found.append(
            Text(
                f"held: accepts nothing for another {render.duration_text(held_s)}", style="yellow"
            )
        )
    for generation, seconds in untaken(status):
        span = render.duration_text(seconds)
        late = f"generation {generation}: no worker has taken a waiting client for {span}"
        found.append(Text(late, style="yellow"))
    return found


def untaken(status: Message) -> list[tuple[int, float]]:
    """Return the generations whose workers take no client, and for how many seconds."""
    found = []
    for each in listed(status, "generations"):
        seconds = each.get("untaken_s")
        if isinstance(seconds, int | float):
            found.append((number_in(each, "number"), float(seconds)))
    return found


def listeners(status: Message) -> list[Text]:
    """Return where it listens, and how many clients wait there."""
    found = []
    for each in listed(status, "listeners"):
        words = f"listens on {text_in(each, 'address')}"
        if each.get("backlog") is not None:  # the kernel does not tell for UNIX sockets
            limit = render.count(each.get("backlog_limit"))
            words += f", {render.count(each.get('backlog'))} of {limit} wait"
        found.append(render.line(words))
    return found


def sums(status: Message) -> Text:
    """What went through it."""
    command = status.get("command")
    words = command if isinstance(command, list) else []
    return render.line(
        f"forwarded {render.count(status.get('forwarded'))}, "
        f"lost {render.count(status.get('lost'))}, "
        f"queue of {render.count(status.get('queue_limit'))}, "
        f"ready: {status.get('ready')}, command: {' '.join(map(str, words))}"
    )


def generations(status: Message) -> Table:
    """One row for each."""
    now = status.get("now")
    rows: list[Row] = []
    for each in sorted(listed(status, "generations"), key=lambda g: -number_in(g, "number")):
        workers = listed(each, "workers")
        ready = sum(worker.get("state") in ("ready", "retiring") for worker in workers)
        waits = each.get("wait_us")
        wait_us: Message = waits if isinstance(waits, dict) else {}
        rows.append(
            (
                number_in(each, "number"),
                text_in(each, "phase"),
                render.duration_text(render.seconds_since(now, each.get("opened_at"))),
                f"{ready}/{len(workers)}",
                render.count(each.get("queue")),
                render.count(each.get("active")),
                render.count(each.get("accepted")),
                render.count(each.get("errors")),
                render.count(each.get("lost")),
                render.latency_text(wait_us.get("p50")),
                render.latency_text(wait_us.get("p99")),
            )
        )
    return _columns(_GENERATIONS, rows)


def workers(status: Message) -> Table:
    """One row for each, the newest generation first."""
    now = status.get("now")
    rows: list[Row] = []
    for generation in sorted(listed(status, "generations"), key=lambda g: -number_in(g, "number")):
        for each in listed(generation, "workers"):
            deaths = number_in(each, "quick_deaths")
            says = text_in(each, "status")
            if deaths:
                says = render.several(deaths, "quick death") + (f"; {says}" if says else "")
            rows.append(
                (
                    number_in(each, "number"),
                    number_in(generation, "number"),
                    number_in(each, "pid") or None,
                    text_in(each, "state"),
                    render.duration_text(render.seconds_since(now, each.get("started_at"))),
                    render.count(each.get("active")),
                    render.count(each.get("accepted")),
                    render.count(each.get("errors")),
                    says,
                )
            )
    return _columns(_WORKERS, rows)


def _columns(headings: tuple[str, ...], rows: list[Row]) -> Table:
    return render.columns(headings, rows, right=[each for each in headings if each not in _WORDS])


def last_reload(status: Message) -> list[Text]:
    """How the last one ended, and the last that failed where that is another."""
    now = status.get("now")
    reloads = listed(status, "reloads")
    ended = [each for each in reloads if each.get("result") in ("reloaded", "failed")]
    found = []
    if reloads and reloads[-1].get("result") == "running":
        found.append(_reload("reload under way", reloads[-1], now))
    if ended:
        found.append(_reload("last reload", ended[-1], now))
    if crashes := number_in(status, "crashes"):
        found.append(
            render.line(
                f"{render.several(crashes, 'crash', 'crashes')}: socketprotectorctl crashes"
            )
        )
    return found


def _reload(title: str, each: Message, now: object) -> Text:
    at = each.get("ended_at") if each.get("ended_at") is not None else each.get("began_at")
    reason = headline(text_in(each, "reason"))
    return Text.assemble(
        f"{title}: generation {number_in(each, 'generation')} ",
        render.cell(text_in(each, "result")),
        f" {render.duration_text(render.seconds_since(now, at))} ago",
        render.cell(f": {reason}" if reason else ""),
    )
