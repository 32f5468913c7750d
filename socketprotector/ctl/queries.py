"""Commands that only read: status, ready, history, connections, crashes, diff, events, list."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import asdict

import click

from ..model.text import field, headline
from ..system import control_path
from . import discovery
from .cli import (
    Instance,
    command,
    complain,
    plural,
    say,
    say_json,
    say_last_words,
    say_outcome,
    tell,
)
from .client import Client, Message
from .connections import (
    AT_LEAST,
    AT_MOST,
    EXACT,
    Connection,
    HiddenWorker,
    addresses_of,
    find_connections,
    known_addresses,
)
from .errors import ConnectionLost, NewVersionFailed, NoProtector, NotReady, RequestRefused
from .fields import (
    completions,
    is_lame_duck,
    label,
    listed,
    measure,
    number_in,
    text_in,
    unhealthy,
    why_not_ready,
)
from .query_all import SocketAnswer
from .server_children import children_of

#: The pause between attempts of `events --follow` to connect for the first time.
_AGAIN_EVERY_S = 1.0
#: How long to wait for the answer to `diff`.  The answer may take long, because the protector
#: starts a process that reads the configuration and resolves the listeners' host names.  The
#: protector ends this process after --start-timeout (60s by default), and then answers.
_DIFF_S = 75.0
#: The longest single wait for an event.  `events` repeats the wait without end.
_LISTEN_S = 3600.0
#: `list` shows only the first _ADDRESSES addresses of a protector, and only the first
#: _ADDRESS_CHARACTERS characters of an address.
_ADDRESSES, _ADDRESS_CHARACTERS = 64, 200
#: Connection.bound -> the sign before the age.
_BOUNDS = {EXACT: "", AT_LEAST: ">=", AT_MOST: "<="}


def known_generations(ctx: click.Context, _: click.Parameter, typed: str) -> list[str]:
    """Return the numbers of generations that begin with the typed text."""
    try:
        generations = listed((ctx.obj or Instance()).request("status"), "generations")
    except Exception:  # an error is shown when the command is run, not while it is typed
        return []
    return completions((str(number_in(each, "number")) for each in generations), typed)


#: The type of an argument GENERATION.
GENERATION = click.IntRange(1, 2**31 - 1)


@command(short_help="Show generations, workers and the last reload.")
def status(instance: Instance, as_json: bool) -> None:
    """Show generations, workers, queues, the last reload, and what SocketProtector waits for.

    Columns of generations (GEN) and workers (WORKER):

    \b
    SHARE          part of the new connections, during a rollout
    AGE            time since the start
    READY          ready workers, of all workers
    QUEUE          clients that no worker has taken yet
    ACTIVE         open connections
    ACCEPTED       all connections so far
    ERRORS         connections whose handler failed
    LOST           connections that were open when their worker ended
    WAIT-P50, P99  percentiles of the time in the queue
    CHILDREN       number and pids of the worker's child processes
    SAYS           quick deaths before this worker, and its status text
    -              unknown
    """
    with instance.client() as client:
        found = client.request("status")
        shares_pids = client.shares_pids(found)
    if as_json:
        say_json(found)
        return
    from . import render, status_table

    render.show(
        *status_table.heading(found),
        status_table.totals(found),
        *status_table.listeners(found),
        *status_table.reload_lines(found),
        render.line(),
        status_table.generations(found),
    )
    if any(listed(each, "workers") for each in listed(found, "generations")):
        children = children_of(found) if shares_pids else {}
        render.show(render.line(), status_table.workers(found, children))
    render.show(*status_table.omitted_columns(found))


@command(short_help="Exit with 0 if SocketProtector is ready for clients.")
@click.option("--health", is_flag=True, help="Report an unhealthy instance as not ready.")
def ready(instance: Instance, health: bool, as_json: bool) -> None:
    """Print whether SocketProtector is ready for clients, as /readyz of the exporter does.

    Exit status 0: ready, even during a hold, or while the workers of the serving generation
    restart. 3: no generation is serving, no client can connect, a stop has begun, SocketProtector
    is a lame duck, or, with --health, it is unhealthy.
    """
    found = instance.request("status")
    why, why_unhealthy = why_not_ready(found), unhealthy(found)
    if health and not why and why_unhealthy is not None:
        why = f"unhealthy: {why_unhealthy}"
    if as_json:
        say_outcome(say_json, {"ready": not why, "why": why or None})
    if why:
        raise NotReady(f"not ready: {why}")
    if not as_json:
        say(f"ready: generation {number_in(found, 'route')} is serving")


@command(short_help="List the last reloads, dry runs and changes of health.")
def history(instance: Instance, as_json: bool) -> None:
    """List the last reloads, dry runs and changes of health, with result and reason.

    The newest is last. The protector keeps 50 reloads, 20 dry runs and 50 changes of health. These
    entries survive an upgrade, and a crash under --guard or systemd. Only recent reloads and dry
    runs have last words.
    """
    try:
        result = instance.request("history")
    except RequestRefused as error:
        if error.code != "unknown":
            raise
        why = "this protector is older than socketprotectorctl and does not know history"
        hint = "run `upgrade`, or see `status`"
        raise RequestRefused(error.code, f"{why}; {hint}") from None
    if as_json:
        say_json(result)
        return
    from . import render

    found = listed(result, "history")
    for each in found:
        kind, reason = text_in(each, "kind"), text_in(each, "reason")
        began_at, ended_at = each.get("began_at"), each.get("ended_at")
        first_line = headline(reason)
        took = f" after {render.age_text(ended_at, began_at)}" if ended_at != began_at else ""
        render.show(
            render.line(
                f"{render.time_text(began_at)} {kind}: generation {each.get('generation')} ",
                text_in(each, "result"),
                took if ended_at is not None else "",
                f": {first_line}" if first_line else "",
            )
        )
        say_last_words(reason.partition("\n")[2])
    if not found:
        say("no reload, dry run or change of health yet")


@command(short_help="List open connections: peer, age, worker.")
@click.argument("generation", type=GENERATION, required=False, shell_complete=known_generations)
def connections(instance: Instance, generation: int | None, as_json: bool) -> None:
    """Show each open connection: its peer, age, worker, and bytes that the worker has not read.

    A draining generation ends after its last connection has ended, or after --drain-timeout.

    The command reads /proc, so run it as root or as the workers' user. An age with >= is a lower
    limit, an age with <= an upper limit.
    """
    with instance.client() as client:
        state = client.request("status")
        arguments = {} if generation is None else {"generation": generation}
        answer = client.request("connections", **arguments)
        shares_pids = client.shares_pids(state)
    now = measure(state, "now") or time.time()
    draining = {
        number_in(each, "number")
        for each in listed(state, "generations")
        if each.get("phase") == "draining"
    }
    found, hidden = find_connections(
        listed(answer, "workers"),
        addresses_of(state),
        now,
        draining,
        known=known_addresses(answer),
        shares_pids=shares_pids,
    )
    found.sort(key=lambda each: (each.generation, -each.age_s))
    if as_json:
        say_json({"connections": [asdict(c) for c in found], "unseen": [asdict(w) for w in hidden]})
        return
    _show_connections(state, found, hidden)


def _show_connections(state: Message, found: list[Connection], hidden: list[HiddenWorker]) -> None:
    from . import render

    rows = [
        (
            *(each.generation, each.worker, each.pid, each.peer, each.local),
            _BOUNDS[each.bound] + render.duration_text(each.age_s),
            render.size(each.waiting_bytes),
        )
        for each in found
    ]
    if rows:
        headings = "GENERATION WORKER PID PEER LOCAL AGE WAITING"
        render.show(render.columns(headings, rows), render.line())
    phases = {number_in(g, "number"): text_in(g, "phase") for g in listed(state, "generations")}
    for number, count in sorted(Counter(each.generation for each in found).items()):
        group = [c for c in found if c.generation == number]
        exact_or_at_least = [c for c in group if c.bound != AT_MOST]
        any_at_least = any(c.bound == AT_LEAST for c in group)
        oldest = max(exact_or_at_least if any_at_least else group, key=lambda c: c.age_s)
        bound = AT_LEAST if any_at_least else oldest.bound
        age = _BOUNDS[bound] + render.duration_text(oldest.age_s)
        words = f"{count} {plural(count, 'connection')}, oldest {age}"
        say(f"generation {number} {phases.get(number, '')}: {words}")
    if not found:
        say("no connections" + (" that this user can see" if hidden else ""))
    for worker in hidden:
        complain(
            f"worker {worker.worker} of generation {worker.generation}, pid {worker.pid}: "
            f"{worker.why}"
        )


@command(short_help="List the last crashes of workers.")
def crashes(instance: Instance, as_json: bool) -> None:
    """List the workers that failed last, with cause, time, lost connections and last words."""
    result = instance.request("crashes")
    found = listed(result, "crashes")
    if as_json:
        say_json(result)
        return
    from . import render

    for each in found:
        lost, cpu_s, kib = each.get("lost"), each.get("cpu_s"), each.get("max_rss_kib")
        say(
            f"{render.time_text(each.get('at'))} worker {each.get('worker')} of generation "
            f"{each.get('generation')}, pid {each.get('pid')}, {each.get('how')} while "
            f"{each.get('when')}; connections lost: {render.count(lost)}, "
            f"CPU {render.duration_text(cpu_s)}, "
            f"memory {render.size(kib * 1024 if isinstance(kib, int) else None)}"
        )
        say_last_words(text_in(each, "last_words"))
    if not found:
        say("no crashes")
    elif (last_words_hint := text_in(result, "last_words_hint")) and not all(
        text_in(each, "last_words") for each in found
    ):
        say(f"no last words: {last_words_hint}")


@command()
def diff(instance: Instance, as_json: bool) -> None:
    """Show what a reload would change."""
    # events=True: otherwise the protector disconnects a client that sends no request for 30 s.
    with instance.client(_DIFF_S, events=True) as client:
        try:
            result = client.request("diff")
        except RequestRefused as error:
            if error.code == "refused":
                raise NewVersionFailed(f"a reload would fail: {error}") from None
            raise
    changes, needs_restart = (result.get(each) for each in ("changes", "needs_restart"))
    if as_json:
        say_outcome(say_json, result)
    else:
        for each in changes if isinstance(changes, list) else []:
            say_outcome(say, str(each))
        if not changes:
            say(
                "no configuration change (files such as --env-file are not compared); "
                "a reload would only restart the command"
            )
    if needs_restart and isinstance(needs_restart, list):
        raise NewVersionFailed(
            f"a reload would be refused: {len(needs_restart)} of the changes above cannot take "
            "effect without a restart"
        )


# -- events -----------------------------------------------------------------------------


@command(short_help="Print events as they happen.")
@click.option(
    "--follow", is_flag=True, help="While the protector is not running, wait for its start."
)
def events(instance: Instance, follow: bool, as_json: bool) -> None:
    """Print all events from now on, until Ctrl-C.

    An upgrade or a crash does not end the command if the protector answers again within 10 s.
    """
    path = instance.path()
    with _events_client(path, follow) as client:
        while True:
            try:
                event = client.event(_LISTEN_S)
            except ConnectionLost:
                tell("the connection was cut; connecting again")
                _reconnect(client, follow)
                continue
            if event is not None:
                _show_event(event, as_json)


def _events_client(path: str, follow: bool) -> Client:
    """Return a new connection that follows events.

    follow: if no protector answers, try again, as long as the socket's folder exists.
    """
    while True:
        try:
            return Client(path, events=True)
        except NoProtector:
            if not follow or not os.path.isdir(os.path.dirname(path)):
                raise
            time.sleep(_AGAIN_EVERY_S)


def _reconnect(client: Client, follow: bool) -> None:
    """Connect again.  With `follow`, try without end; otherwise raise NoProtector on failure."""
    while True:
        try:
            client.reconnect()
            return
        except NoProtector:
            if not follow:
                raise


def _show_event(event: Message, as_json: bool) -> None:
    if as_json:
        say_json(event)
        return
    from . import render

    excluded = ("v", "event", "at", "level", "last_words")
    level, name = text_in(event, "level"), text_in(event, "event")
    words = [render.time_text(event.get("at")), f"{level:7}", f"event={field(name)}"]
    for each, value in event.items():
        if each not in excluded and value is not None:
            words.append(f"{field(each)}={field(value)}")
    styled = render.line(" ".join(words))
    styled.stylize(str(render.cell(level).style))
    render.show(styled)
    say_last_words(text_in(event, "last_words"))


# -- list -------------------------------------------------------------------------------


@command("list", short_help="List the protectors that have a control socket.")
@click.option("--living", is_flag=True, help="Leave out sockets of killed protectors.")
def list_all(instance: Instance, living: bool, as_json: bool) -> None:
    """List the protectors that have a control socket in one of the usual folders.

    The usual folders are $XDG_RUNTIME_DIR/socketprotector and /run/socketprotector.
    """
    if instance != Instance():
        raise click.UsageError(
            "list shows all protectors; it takes no --name, --control or --pid-file"
        )
    found = [each for each in discovery.query_all_sockets() if each.alive or not living]
    names = discovery.names(found)
    if as_json:
        instances = [
            {
                "name": name,
                "key": control_path.key(each.path),
                "control": each.path,
                "why": each.why or None,
                "status": each.result,
            }
            for name, each in zip(names, found, strict=True)
        ]
        say_json({"instances": instances})
        return
    if not found:
        say(discovery.none_found())
        return
    from . import render

    rows = []
    for name, each in zip(names, found, strict=True):
        try:
            rows.append(_row(name, each))
        except Exception:  # a malformed status must not hide the other protectors
            rows.append(_row(name, SocketAnswer(each.path, pid=each.pid, why="no protector")))
    headings = "NAME PHASE PID GENERATION UP FORWARDED LISTENS CONTROL"
    render.show(render.columns(headings, rows))


def _row(name: str, found: SocketAnswer) -> tuple[str | int | None, ...]:
    """Return a protector's row in the table of `list`."""
    from . import render, status_table

    state = found.result or {}
    phase = label(state, "phase")
    if status_table.stuck_generations(state):
        phase = "stuck"
    elif is_lame_duck(state):
        phase = "lame duck"
    elif unhealthy(state) is not None:
        phase = "unhealthy"
    route = state.get("route")
    listens = addresses_of(state)
    return (
        name,
        phase or found.why,
        number_in(state, "pid") or found.pid or None,
        route if isinstance(route, int) else None,
        render.age_text(state.get("now"), state.get("started_at")),
        render.count(state.get("forwarded")),
        " ".join(each[:_ADDRESS_CHARACTERS] for each in listens[:_ADDRESSES]),
        found.path,
    )
