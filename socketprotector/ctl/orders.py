"""Commands that exit once the protector has answered: scale, lame-duck, promote and others.

Exception: `hold` without --for runs until a signal or an error ends the command.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import click

from ..model.duration import Duration
from ..model.errors import UsageError
from ..model.text import in_units
from .cli import Instance, command, plural, say, say_result, tell
from .client import Client, Message
from .errors import ControlError, RequestRefused
from .fields import listed, number_in
from .queries import GENERATION, known_generations

#: Without --for, `hold` requests a hold of _HOLD_S, and renews this hold every _RENEW_HOLD_EVERY_S.
#: So the hold ends within _HOLD_S if KILL ends the command.
_RENEW_HOLD_EVERY_S = 1.0
_HOLD_S = 5.0
_LEVELS = ("debug", "info", "warning", "error")
#: Lets click read the -1 of `scale -1` as a number, not as an option.
_NEGATIVE = {"ignore_unknown_options": True}


@command(context_settings=_NEGATIVE, short_help="Set or change the number of workers.")
@click.argument("workers", metavar="N|+N|-N")
def scale(instance: Instance, workers: str, as_json: bool) -> None:
    """Set the number of workers to N, or increase or decrease the number by N."""
    if not re.fullmatch(r"[+-]?\d{1,9}", workers, re.ASCII):
        raise click.BadParameter(f"{workers!r}: write N, +N or -N", param_hint="N")
    how = "by" if workers[0] in "+-" else "to"
    result = instance.request("scale", **{how: int(workers)})
    wanted = number_in(result, "workers")
    say_result(as_json, result, f"{wanted} {plural(wanted, 'worker')} wanted")


# -- for load balancers --------------------------------------------------------------------


@command("lame-duck", short_help="Report to load balancers: not ready (on), or ready (off).")
@click.argument("state", metavar="on|off", type=click.Choice(["on", "off"]))
def lame_duck(instance: Instance, state: str, as_json: bool) -> None:
    """With "on", keep serving, but make /readyz of socketprotector-exporter answer 503.

    Load balancers then send clients elsewhere. /readyz answers 503 until `lame-duck off`, or until
    SocketProtector ends.
    """
    words = (
        "lame duck: still serving, but not ready for new clients"
        if state == "on"
        else "ready again"
    )
    say_result(as_json, instance.request("lame-duck", on=state == "on"), words)


# -- hold --------------------------------------------------------------------------------


@command(short_help="Let new clients wait, neither accepted nor refused.")
@click.option(
    "--for",
    "seconds",
    type=Duration(zero=False),
    default=None,
    help="End the hold after this time; the command returns at once.",
)
def hold(instance: Instance, seconds: float | None, as_json: bool) -> None:
    """Let new clients wait: they are neither accepted nor refused.

    Clients wait in the kernel's backlog. Under --handoff listener, TCP clients get no answer, and
    their own kernels try again to connect, at growing intervals.

    Without --for the hold lasts while this command runs; Ctrl-C or TERM ends the command and the
    hold. If KILL ends the command, the hold ends within 5 s.
    """
    if seconds is not None:
        result = instance.request("hold", seconds=seconds)
        words = f"on hold for {in_units(seconds)}; `release` ends the hold earlier"
        say_result(as_json, result, words)
        return
    with instance.client() as client, _end_requested() as end_requested:
        result = client.query("hold", seconds=_HOLD_S)
        say_result(as_json, result, "on hold while this command runs; Ctrl-C ends the hold")
        released = False
        try:
            while not end_requested(_RENEW_HOLD_EVERY_S):
                client.query("hold", seconds=_HOLD_S)
        finally:
            if client.fileno() >= 0:  # without a connection, the hold ends within _HOLD_S
                released = _end_hold(client)
        if released and not as_json:
            say("released")


def _end_hold(client: Client) -> bool:
    """Send `release`; if that fails, print a warning and return False."""
    try:
        client.query("release")
    except ControlError:
        tell(f"could not release the hold, which ends within {in_units(_HOLD_S)}")
        return False
    return True


@contextmanager
def _end_requested() -> Iterator[Callable[[float], bool]]:
    """Yield a function that waits for INT, TERM or HUP, and returns True if such a signal came.

    The function's argument is the longest wait, in seconds.  These signals are blocked until the
    context ends, so that none interrupts _end_hold().
    """
    numbers = {
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup ignores HUP
    }
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield lambda seconds: signal.sigtimedwait(numbers, seconds) is not None
    finally:
        while signal.sigtimedwait(numbers, 0) is not None:
            pass  # ignore a second Ctrl-C
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@command(short_help="End a hold.")
def release(instance: Instance, as_json: bool) -> None:
    """End a hold: clients are accepted again.

    While a `hold` command without --for runs, end that command instead: it would renew the hold.
    """
    say_result(as_json, instance.request("release"), "released")


# -- rollouts ------------------------------------------------------------------------------


@command(short_help="End the current stage of a rollout early.")
@click.option("--now", is_flag=True, help="Skip all stages; a rolling reload refuses this.")
def promote(instance: Instance, now: bool, as_json: bool) -> None:
    """End the current stage of a rollout.

    After a canary's stage, the new generation gets all new clients. After the stage of --settle,
    the new generation is serving. Exception: in a rolling reload, SocketProtector first replaces
    the remaining old workers.

    With --now the new generation skips all stages and is serving at once.
    """
    result = instance.request("promote", **({"now": True} if now else {}))
    number = number_in(result, "generation")
    what = "is serving" if now else "has left its stage; see `status`"
    say_result(as_json, result, f"promoted: generation {number} {what}")


# -- generations and workers ------------------------------------------------------------


@command(short_help="Replace the serving generation, or a worker.")
@click.argument("which", metavar="GEN|PID", shell_complete=known_generations)
def replace(instance: Instance, which: str, as_json: bool) -> None:
    """Replace the serving generation, one worker, or a worker's forked child.

    The replacement runs the same command.

    If a number is both a generation and a pid, write generation:N or pid:N.
    """
    with instance.client() as client:
        status = client.request("status")
        target = _generation_or_pid(which, status)
        result = client.request("replace", **target)
    if "generation" in target:
        number = target["generation"]
        words = f"a new generation of the same command replaces generation {number}, which then "
        words += "drains"
    elif target["pid"] in _pids(_forked(_workers(status))):
        parent = f"worker {number_in(result, 'worker')}"
        words = f"process {target['pid']} finishes; its parent, {parent}, forks another"
    else:
        words = f"worker {number_in(result, 'worker')} leaves when its replacement is ready"
    say_result(as_json, result, words)


def _generation_or_pid(which: str, status: Message) -> dict[str, int]:
    """Return the argument of the request `replace`: a generation, or a pid.

    which: the command's argument.
    """
    found = re.fullmatch(r"(?:(generation|pid):)?(\d{1,9})", which, re.ASCII)
    if found is None:
        raise click.BadParameter(f"{which!r}: write a generation or a pid", param_hint="GEN|PID")
    number = int(found[2])
    if found[1]:
        return {found[1]: number}
    numbers = {number_in(each, "number") for each in listed(status, "generations")}
    workers = _workers(status)
    pids = _pids((*workers, *_forked(workers)))
    if number in numbers and number in pids:
        raise UsageError(
            f"{number} is a generation and a pid; write generation:{number} or pid:{number}"
        )
    if number not in numbers | pids:
        known = ", ".join(map(str, sorted(numbers)))
        raise RequestRefused(
            "unknown", f"{number} is neither a generation nor a worker's pid; generations: {known}"
        )
    return {"pid" if number in pids else "generation": number}


def _workers(status: Message) -> list[Message]:
    return [w for each in listed(status, "generations") for w in listed(each, "workers")]


def _forked(workers: Iterable[Message]) -> list[Message]:
    """Return the forked children of these workers."""
    return [child for each in workers for child in listed(each, "processes")]


def _pids(processes: Iterable[Message]) -> set[int]:
    return {number_in(each, "pid") for each in processes}


@command(short_help="Send KILL to the workers of a draining or abandoned generation.")
@click.argument("generation", type=GENERATION, shell_complete=known_generations)
def kill(instance: Instance, generation: int, as_json: bool) -> None:
    """Send KILL to the workers of a draining or abandoned generation; their connections end."""
    result = instance.request("kill", generation=generation)
    killed = number_in(result, "workers")
    say_result(
        as_json, result, f"killed {killed} {plural(killed, 'worker')} of generation {generation}"
    )


# -- the log --------------------------------------------------------------------------------


@command("log-level", short_help="Set the log level.")
@click.argument("level", type=click.Choice(_LEVELS))
def log_level(instance: Instance, level: str, as_json: bool) -> None:
    """Set the log level until the protector stops, or a reload changes --log-level."""
    say_result(as_json, instance.request("log-level", level=level), f"log level {level}")


@command()
def reopen(instance: Instance, as_json: bool) -> None:
    """Reopen the log file, after a rotation."""
    say_result(as_json, instance.request("reopen"), "reopened")
