"""The lines of the table about a worker's start: its imports, and HUP to its first answer."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from bench.figures import Figure, Scale, alternately, median
from bench.processes import HERE, protector
from bench.reload_rows import first_answer
from bench.rows import compiled

LIBRARY = "from socketprotector_client import serve"
#: Of these a bare worker needs most, too.
SOCKETS = "import socket, threading"
PAUSE_S = 0.2


def _run(code: str) -> tuple[float, float]:
    """Run an interpreter; return its milliseconds, and those of processor time."""
    begun_s = time.monotonic()
    command = [sys.executable, "-c", code]
    _, status, used = os.wait4(os.posix_spawn(command[0], command, os.environ), 0)
    if status:
        raise OSError(f"{code!r} ended with {status}")
    return (time.monotonic() - begun_s) * 1e3, (used.ru_utime + used.ru_stime) * 1e3


def _added(more: Sequence[float], less: Sequence[float]) -> tuple[float, str]:
    """Return the median of the differences of neighbours, and it in words."""
    middle = median([a - b for a, b in zip(more, less, strict=True)])
    return middle, f"{middle:+.1f} ms ({median(more):.1f} against {median(less):.1f})"


def start(scale: Scale) -> list[Figure]:
    """What the client library adds to the start of a worker."""
    compiled()
    return [_imports(scale), _first_answers(scale)]


def _imports(scale: Scale) -> Figure:
    codes = ("pass", SOCKETS, LIBRARY)
    taken = alternately(scale.rounds(60, 5), *(partial(_run, code) for code in codes))
    wall, cpu = ([[each[k] for each in runs] for runs in taken] for k in (0, 1))
    added, words = _added(wall[2], wall[0])
    return Figure(
        f"`{LIBRARY}`, more than an interpreter that does nothing",
        words,
        "<= 20 ms",
        "",
        added <= 20,
        [
            f"processor time {_added(cpu[2], cpu[0])[1]}",
            f"of these `{SOCKETS}` {_added(wall[1], wall[0])[1]}, "
            f"processor time {_added(cpu[1], cpu[0])[1]}",
        ],
    )


def _first_answers(scale: Scale) -> Figure:
    program = [sys.executable, str(HERE / "starts.py")]
    with (
        protector(command=[*program, "library"]) as library,
        protector(command=[*program, "bare"]) as bare,
    ):

        def reload(which: Callable[[], tuple[int, int]]) -> float:
            begun_ns, served_ns = which()
            time.sleep(PAUSE_S)  # the old worker's end is not part of the next reload
            return (served_ns - begun_ns) / 1e6

        more, less = alternately(
            scale.rounds(40, 5),
            *(partial(reload, partial(first_answer, each)) for each in (library, bare)),
        )
    added, words = _added(more, less)
    return Figure(
        "HUP to the first answer by `serve`, more than by a worker without the library",
        words,
        "<= 25 ms",
        "",
        added <= 25,
        [f"{len(more)} reloads of each, in turn, of two idle protectors"],
    )
