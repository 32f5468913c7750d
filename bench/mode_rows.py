"""The lines of the table that set the ways to share a port side by side, on a machine that is busy.

Accepting is the workers' or ours, and what differs is how many processes a connection goes
through, so a core that another process burns shows it, and few clients more than many.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from bench.figures import Figure, Scale, alternately, ratio
from bench.hog_rows import burning, one_group
from bench.processes import (
    HANDED,
    Started,
    direct,
    free_port,
    protector,
    worker_command,
)
from bench.rows import Seen, column, load, middle_of, nothing_failed

CLIENTS = (1, 8, 64)
#: The worker answers these and leaves the connection open.
_AGAIN = ("--again", "--send", "hold\n")
#: Server::Starter says the descriptor's number in its own way.
_AS_OURS = 'BENCH_LISTENER="${SERVER_STARTER_PORT##*=}" exec "$@"'

_CONNECTION, _LISTENER, _STARTER, _ALONE = "connection", "listener", "Server::Starter", "alone"


def _server_starter() -> Started:
    """Start the same worker under Server::Starter, which hands it the listener."""
    address = f"127.0.0.1:{free_port()}"
    supervisor = ["start_server", f"--port={address}", "--"]
    return Started(
        [*supervisor, "sh", "-c", _AS_OURS, "sh", *worker_command("direct")], address, {}, []
    )


def _ways() -> Iterator[tuple[str, Callable[[], Started]]]:
    yield _CONNECTION, protector
    yield _LISTENER, partial(protector, *HANDED)
    if shutil.which("start_server"):
        yield _STARTER, _server_starter
    yield _ALONE, direct


def _figure(what: str, seen: dict[str, list[Seen]], said: list[str]) -> Figure:
    rates = {way: column(runs, "per_second") for way, runs in seen.items()}
    _, words = ratio(rates[_LISTENER], rates[_CONNECTION])
    notes = [
        f"{way}: {middle_of(runs, 'per_second'):,.0f}/s, {ratio(rates[way], rates[_ALONE])[1]} of "
        f"the worker alone; p50 {middle_of(runs, 'p50_us'):.0f} us, "
        f"p99 {middle_of(runs, 'p99_us'):.0f}, longest {middle_of(runs, 'max_us') / 1e3:.1f} ms"
        for way, runs in seen.items()
    ]
    title = f"beside a hog, {what}: --handoff listener / connection"
    return Figure(title, words, notes=[*notes, *said])


def modes(scale: Scale) -> list[Figure]:
    """Requests/s of each way to share a port beside a hog, for few clients and for many."""
    figures = []
    with ExitStack() as stack:
        grouped = stack.enter_context(one_group())
        started = {way: stack.enter_context(start()) for way, start in _ways()}
        stack.enter_context(burning())
        said = [] if _STARTER in started else ["Server::Starter: not installed"]
        if not grouped:
            said.append("no cgroup could be made: sessions, not processes, have the same weight")
        for kind, options in (("a connection each", ("--plain",)), ("keep-alive", _AGAIN)):
            for clients in CLIENTS:
                takers = [
                    partial(load, each, clients, scale(1, 0.3), *options)
                    for each in started.values()
                ]
                runs = alternately(scale.rounds(11), *takers)
                nothing_failed([each for its in runs for each in its])
                what = f"{kind}, C={clients}"
                figures.append(_figure(what, dict(zip(started, runs, strict=True)), said))
    return figures
