"""Renders the heading and the tables of `status` and `top`.  (queries.py renders `list`.)"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from ..model.handoff_modes import MODES
from ..model.share import percentage_text
from ..model.text import headline
from . import render
from .cli import plural, with_instance
from .client import Message
from .fields import (
    closing_text,
    failing,
    listed,
    number_in,
    other_waits_of,
    rollout_text,
    share_of,
    text_in,
    unhealthy,
)
from .render import Row

#: The columns of the tables of generations and of workers.
_GENERATIONS = "GEN PHASE SHARE AGE READY QUEUE ACTIVE ACCEPTED ERRORS LOST WAIT-P50 P99"
_WORKERS = "WORKER GEN PID STATE AGE ACTIVE ACCEPTED ERRORS CHILDREN SAYS"
#: Column -> its field.  A column is omitted if its field is unknown in all rows.
_FIELDS = {
    "QUEUE": "queue",
    "ACTIVE": "active",
    "ACCEPTED": "accepted",
    "ERRORS": "errors",
    "LOST": "lost",
    "WAIT-P50": "wait_us",
    "P99": "wait_us",
}
#: A row shows at most this many pids of a worker's children.
_MOST_PIDS = 4


def heading(status: Message) -> list[Text]:
    """Return the first lines: phase, uptime, rollout, closing connections, warnings."""
    up = render.age_text(status.get("now"), status.get("started_at"))
    words = [f" pid {status.get('pid')}, version {status.get('version')}, up {up}"]
    if restarts := number_in(status, "restarts"):
        words.append(f"{restarts:,} {plural(restarts, 'restart')} or {plural(restarts, 'upgrade')}")
    if status.get("guarded") is True:
        words.append("guarded")
    health, releases = status.get("health"), status.get("releases")
    if isinstance(health, dict) and health.get("state") == "healthy":
        words.append("healthy")
    if isinstance(releases, dict) and (serving := text_in(releases, "serving")):
        words.append(f"release {serving}")
    name = render.styled(text_in(status, "name"), "bold")
    phase = render.cell(text_in(status, "phase"))
    found = [Text.assemble(name, ": ", phase, ",", render.cell(", ".join(words)))]
    if says := rollout_text(status):
        found.append(render.line(f"rollout: {says}"))
    warnings = []
    held_s = status.get("held_s")
    if isinstance(held_s, int | float):
        span = render.duration_text(held_s)
        warnings.append(f"held: no connection is accepted for another {span}")
    lame_duck_s = status.get("lame_duck_s")
    if isinstance(lame_duck_s, int | float):
        span = render.duration_text(lame_duck_s)
        warnings.append(f"lame duck: /readyz answers 503; still serving, the stop begins in {span}")
    elif status.get("lame_duck") == "on":
        warnings.append("lame duck: /readyz answers 503; still serving")
    if says := _health_line(status):
        warnings.append(says)
    # Leave out the waits `hold` and `lame-duck`: the warnings above report them.
    shown = [each for each in other_waits_of(status) if each.kind not in ("hold", "lame-duck")]
    warnings += [f"waiting: {each.text}" for each in shown]
    for each in listed(status, "generations"):
        if says := closing_text(each):
            found.append(render.line(f"generation {number_in(each, 'number')}: {says}"))
        if why := failing(each):
            warnings.append(f"generation {number_in(each, 'number')}: {why}")
    for generation, seconds in stuck_generations(status):
        span = render.duration_text(seconds)
        warnings.append(f"generation {generation}: no worker has taken a waiting client for {span}")
    reported = status.get("warnings")
    for each in reported if isinstance(reported, list) else []:
        warnings.append(f"warning: {each}")
    return [*found, *(render.styled(each, "yellow") for each in warnings)]


def _health_line(status: Message) -> str:
    """Return a line about health checks.

    Returns "" without --health, before the first check, or if the protector is healthy and the last
    check was good.
    """
    health = status.get("health")
    if not isinstance(health, dict):
        return ""
    last = text_in(health, "last")
    if (why := unhealthy(status)) is not None:
        last_text = f"; last: {last}" if last not in ("", why) else ""
        age = render.age_text(status.get("now"), health.get("since_at"))
        return f"unhealthy for {age}: {why}{last_text}"
    return f"health is {text_in(health, 'state')}; last: {last}" if last else ""


def stuck_generations(status: Message) -> list[tuple[int, float]]:
    """Return (generation, seconds) for each generation whose workers take no waiting client.

    seconds: how long clients have waited while no worker took a client.
    """
    found = []
    for each in listed(status, "generations"):
        seconds = each.get("oldest_waiting_s")
        if isinstance(seconds, int | float):
            found.append((number_in(each, "number"), float(seconds)))
    return found


def listeners(status: Message) -> list[Text]:
    """Return a line for each listener, with the number of clients that wait there."""
    found = []
    for each in listed(status, "listeners"):
        words = f"listens on {text_in(each, 'address')}"
        if each.get("backlog") is not None:  # None: the kernel does not report the backlog
            waiting, limit = render.counts(each, "backlog", "backlog_limit")
            words += f", {waiting} of {limit} in the backlog"
        found.append(render.line(words))
    return found


def totals(status: Message) -> Text:
    """Return the line with connections forwarded and lost, queue limit, --ready and command."""
    command = status.get("command")
    words = " ".join(map(str, command if isinstance(command, list) else []))
    named = {"forwarded": "forwarded", "lost": "lost", "queue_limit": "queue limit"}
    known = {name: text for name, text in named.items() if status.get(name) is not None}
    counts = zip(known.values(), render.counts(status, *known), strict=True)
    counted = [f"{text} {count}, " for text, count in counts]
    return render.line(f"{''.join(counted)}ready by {status.get('ready')}; command: {words}")


def _newest_first(status: Message) -> list[Message]:
    return sorted(listed(status, "generations"), key=lambda each: -number_in(each, "number"))


def generations(status: Message) -> Table:
    """Return a table with a row for each generation, the newest first."""
    rows: list[Row] = []
    for each in _newest_first(status):
        workers = listed(each, "workers")
        ready = sum(worker.get("state") in ("ready", "retiring") for worker in workers)
        waits = each.get("wait_us")
        wait_us: Message = waits if isinstance(waits, dict) else {}
        rows.append(
            (
                number_in(each, "number"),
                text_in(each, "phase"),
                _share(status, number_in(each, "number")),
                render.age_text(status.get("now"), each.get("opened_at")),
                f"{ready}/{len(workers)}",
                *render.counts(each, "queue", "active", "accepted", "errors", "lost"),
                render.latency_text(wait_us.get("p50")),
                render.latency_text(wait_us.get("p99")),
            )
        )
    hidden = _unknown_columns(status, listed(status, "generations"))
    return _table(_GENERATIONS, rows, hidden if rollout_text(status) else {*hidden, "SHARE"})


def _share(status: Message, generation: int) -> str | None:
    """Return a generation's share of new connections; None without a rollout."""
    share = share_of(status, generation)
    return None if share is None else percentage_text(share)


def workers(status: Message, children: Mapping[int, Sequence[int]]) -> Table:
    """Return a table with a row for each worker, the newest generation first.

    children: the result of children_of() in server_children.py.
    """
    rows: list[Row] = []
    for generation in _newest_first(status):
        for each in listed(generation, "workers"):
            deaths = number_in(each, "quick_deaths")
            says, forked = text_in(each, "status"), listed(each, "processes")
            if deaths:
                quick = f"{deaths:,} quick {plural(deaths, 'death')}"
                says = f"{quick}; {says}" if says else quick
            rows.append(
                (
                    number_in(each, "number"),
                    number_in(generation, "number"),
                    number_in(each, "pid") or None,
                    text_in(each, "state"),
                    render.age_text(status.get("now"), each.get("started_at")),
                    *render.counts(each, "active", "accepted", "errors"),
                    _pids_text(() if forked else children.get(number_in(each, "pid"), ())),
                    says,
                )
            )
            rows += [_child_row(each, generation, child) for child in forked]
    hidden = _unknown_columns(status, _workers_of(status))
    # If the client library reports a worker's forked children, each child has a row of its own, and
    # the worker's cell in CHILDREN stays empty.
    unforked = [each for each in _workers_of(status) if not listed(each, "processes")]
    has_children = any(children.get(number_in(each, "pid")) for each in unforked)
    return _table(_WORKERS, rows, hidden if has_children else {*hidden, "CHILDREN"})


def _child_row(worker: Message, generation: Message, child: Message) -> Row:
    """Return the row of a forked child.  Child 0 of worker 3 is called 3.0."""
    return (
        f"{number_in(worker, 'number')}.{number_in(child, 'number')}",
        number_in(generation, "number"),
        number_in(child, "pid"),
        "child",
        None,
        *render.counts(child, "active", "accepted", "errors"),
        "",
        "",
    )


def omitted_columns(status: Message) -> list[Text]:
    """Return lines that say which columns of _FIELDS are missing from both tables, and why.

    Returns [] if no column is missing.
    """
    hidden = _unknown_columns(status, [*listed(status, "generations"), *_workers_of(status)])
    if not hidden:
        return []
    why = "the workers do not use the client library, or use its Channel, which counts nothing"
    mode = MODES.get(text_in(status, "handoff"))
    if mode is not None and mode.pooled:  # only the counts of exited pools are unknown
        why = "SocketProtector cannot count the connections of an orphaned worker"
    if _workers_accept(status):
        why = "workers accept clients themselves, so SocketProtector cannot count these"
        why += with_instance("; see `connections`")
    return [render.line(), render.line(f"not shown: {', '.join(hidden)}: {why}")]


def _workers_accept(status: Message) -> bool:
    mode = MODES.get(text_in(status, "handoff"))
    return mode is not None and mode.workers_accept


def _workers_of(status: Message) -> list[Message]:
    return [each for generation in _newest_first(status) for each in listed(generation, "workers")]


def _unknown_columns(status: Message, messages: Sequence[Message]) -> dict[str, None]:
    """Return the columns to omit, because their fields are missing or null in all `messages`.

    messages: the generations or workers of the rows.
    If SocketProtector, not the workers, accepts the clients, keep all columns until a worker is
    ready: before that, we cannot see which fields stay unknown.
    """
    any_ready = any(each.get("state") in ("ready", "retiring") for each in _workers_of(status))
    if not messages or not (any_ready or _workers_accept(status)):
        return {}
    known = {name for each in messages for name, value in each.items() if value is not None}
    return dict.fromkeys(column for column, field in _FIELDS.items() if field not in known)


def _table(headings: str, rows: Sequence[Row], hidden: Collection[str]) -> Table:
    shown = [at for at, name in enumerate(headings.split()) if name not in hidden]
    names = " ".join(headings.split()[at] for at in shown)
    return render.columns(names, ([row[at] for at in shown] for row in rows))


def _pids_text(pids: Sequence[int]) -> str:
    """Return the number of pids, and the first _MOST_PIDS pids, such as `2: 4712 4713`."""
    more = " ..." if len(pids) > _MOST_PIDS else ""
    return f"{len(pids)}: {' '.join(map(str, pids[:_MOST_PIDS]))}{more}" if pids else ""


def reload_lines(status: Message) -> list[Text]:
    """Return lines about the current and last reload, the last dry run, and failed workers."""
    now = status.get("now")
    reloads = listed(status, "reloads")
    ended = [each for each in reloads if each.get("result") in ("reloaded", "failed")]
    found = []
    if reloads and reloads[-1].get("result") == "running":
        found.append(_reload_line("reload in progress", reloads[-1], now))
    if ended:
        found.append(_reload_line("last reload", ended[-1], now))
    dry_run = status.get("dry_run")
    if isinstance(dry_run, dict):
        running = dry_run.get("result") == "running"
        found.append(
            _reload_line("dry run in progress" if running else "last dry run", dry_run, now)
        )
    if crashes := number_in(status, "crashes"):
        words = f"{crashes:,} {plural(crashes, 'worker')} failed"
        found.append(render.line(with_instance(f"{words}; see `crashes`")))
    return found


def _reload_line(title: str, each: Message, now: object) -> Text:
    """Return a line about a reload or dry run."""
    at = each.get("ended_at") if each.get("ended_at") is not None else each.get("began_at")
    reason, result = headline(text_in(each, "reason")), text_in(each, "result")
    return Text.assemble(
        f"{title}: generation {number_in(each, 'generation')} ",
        "began" if result == "running" else render.cell(result),
        f" {render.age_text(now, at)} ago",
        render.cell(f": {reason}" if reason else ""),
    )
