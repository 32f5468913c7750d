"""The command top: one screen, redrawn after each interval, for a terminal of at least 80 x 24.

The rate and the wait times are computed from the last two statuses.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ..model.duration import Duration
from ..model.errors import UsageError
from ..model.wait_quantiles import quantile_us
from .cli import Instance, command, say_json
from .client import ANSWER_S, Client, Message
from .errors import ConnectionLost, NoProtector
from .fields import listed, measure
from .server_children import children_of

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

#: How many rates to keep.  draw() shows each rate as one bar.
_KEPT = 200
#: How long to try to reconnect before the screen shows the error.  Keys are not read meanwhile.
_RECONNECT_S = 1.0
#: The number of buckets in the field `wait_us` of a generation (docs/control.md).
_BUCKETS = 32


class Rates:
    """The rates of the last _KEPT intervals, and the wait times of the last interval."""

    def __init__(self) -> None:
        self.history: deque[float] = deque(maxlen=_KEPT)  # connections forwarded per second
        self.p50_us: float | None = None
        self.p99_us: float | None = None
        self._before: Message | None = None

    def on_status(self, status: Message) -> None:
        """Compute the rate and wait times since the previous status.

        The field `now`, from the protector's clock, gives the time between the two statuses.
        """
        before, self._before = self._before, status
        if before is None:
            return
        span_s = (measure(status, "now") or 0.0) - (measure(before, "now") or 0.0)
        if span_s <= 0:
            return
        total, earlier = status.get("forwarded"), before.get("forwarded")
        if isinstance(total, int) and isinstance(earlier, int):
            self.history.append(max(0, total - earlier) / span_s)
        else:
            self.history.clear()  # under --handoff listener, `forwarded` is null
        buckets = zip(_wait_buckets(status), _wait_buckets(before), strict=True)
        counts = [max(0, after - earlier) for after, earlier in buckets]
        self.p50_us, self.p99_us = quantile_us(counts, 0.5), quantile_us(counts, 0.99)

    @property
    def per_second(self) -> float | None:
        """Connections forwarded per second; None before the second status.

        Always None under --handoff listener, where the protector forwards no connections.
        """
        return self.history[-1] if self.history else None


def _wait_buckets(status: Message) -> list[int]:
    """Return the count in each bucket of wait times, summed over all generations."""
    total = [0] * _BUCKETS
    for generation in listed(status, "generations"):
        wait_us = generation.get("wait_us")
        buckets = wait_us.get("buckets") if isinstance(wait_us, dict) else None
        for index, count in enumerate(buckets[:_BUCKETS] if isinstance(buckets, list) else []):
            total[index] += count if isinstance(count, int) else 0
    return total


@command(short_help="Show the status on one screen, redrawn every second.")
@click.option(
    "--interval", default="1s", type=Duration(zero=False), help="Time from one status to the next."
)
def top(instance: Instance, interval: float, as_json: bool) -> None:
    """Show rates, wait times, generations and workers on one screen; q or Ctrl-C quits.

    `status --help` explains the columns. With --json, print the status as one line, once per
    interval.
    """
    is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")  # rich uses the same test
    if not as_json and (is_dumb or not (sys.stdin.isatty() and sys.stdout.isatty())):
        raise UsageError("top: needs a terminal; use status, or top --json")
    with instance.client() as client:
        while as_json:
            say_json(client.query("status"))
            time.sleep(interval)
        _screen(client, interval)


def _screen(client: Client, interval: float) -> None:
    """Redraw the screen after each interval, until the operator quits."""
    from rich.live import Live
    from rich.text import Text

    from . import render

    console = render.console()
    rates = Rates()
    with (
        Live(Text("..."), console=console, screen=True, auto_refresh=False) as live,
        _keys(live) as quit_pressed,
    ):
        while True:
            try:
                status = _status(client)
                rates.on_status(status)
                children = children_of(status) if client.shares_pids(status) else {}
                size = console.width, console.height
                live.update(draw(status, children, rates, *size), refresh=True)
            except NoProtector as error:
                live.update(render.styled(f"no answer: {error}", "red"), refresh=True)
                # Perhaps only a part of the request was sent.  Close the connection, so that
                # _status() reconnects.
                client.close()
            if quit_pressed(interval):
                return


def _status(client: Client) -> Message:
    """Return the status; if the connection has ended, try for _RECONNECT_S to reconnect."""
    try:
        return client.request("status")
    except ConnectionLost:
        return client.reconnect(_RECONNECT_S, ANSWER_S)


@contextmanager
def _keys(live: Live) -> Iterator[Callable[[float], bool]]:
    """Yield a function that waits for the key q, at most for the seconds in its argument.

    The function returns True at q or the end of the input, and False after the longest wait.
    Ctrl-Z restores the terminal's modes and the earlier screen, then suspends the process.  Once
    the process continues, the function returns False.
    """
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    suspend = before[6][termios.VSUSP]

    def set_modes() -> None:
        tty.setcbreak(fd)
        modes = termios.tcgetattr(fd)
        modes[6][termios.VSUSP] = b"\0"  # Ctrl-Z is a key, not a signal
        termios.tcsetattr(fd, termios.TCSADRAIN, modes)

    def quit_pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            if not select.select([fd], [], [], left_s)[0]:
                return False
            keys = os.read(fd, 64)
            if not keys or b"q" in keys or b"Q" in keys:
                return True
            if suspend in keys and suspend != b"\0":
                live.stop()
                termios.tcsetattr(fd, termios.TCSADRAIN, before)
                os.killpg(0, signal.SIGTSTP)
                set_modes()
                live.start()
                return False
        return False

    try:
        set_modes()
        yield quit_pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def draw(
    status: Message, children: dict[int, list[int]], rates: Rates, width: int, height: int
) -> Group:
    """Return the screen.  A small terminal cuts off the end, so the workers' table is last.

    children: the result of children_of() in server_children.py.
    """
    from rich.console import Group
    from rich.text import Text

    from . import render, status_table

    forwarded, lost = render.counts(status, "forwarded", "lost")
    p50, p99 = render.latency_text(rates.p50_us), render.latency_text(rates.p99_us)
    rate = _rate_text(rates.per_second)
    history = list(rates.history)
    bars = max(1, width - 20)
    most = _rate_text(max(history[-bars:], default=None))
    return Group(
        *status_table.heading(status),
        render.styled(
            f"{rate}  wait p50 {p50}, p99 {p99}  forwarded {forwarded}  lost {lost}", "bold"
        ),
        render.styled(f"{render.sparkline(history, bars):>{bars}}  most {most}", "green"),
        *status_table.listeners(status)[: max(1, height // 8)],
        *status_table.reload_lines(status),
        Text(),
        status_table.generations(status),
        Text(),
        status_table.workers(status, children),
    )


def _rate_text(per_second: float | None) -> str:
    return "-/s" if per_second is None else f"{per_second:,.0f}/s"
