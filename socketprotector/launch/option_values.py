"""The types of option values: how to parse and to show a value of each type.

Every error names the allowed values in one line.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Mapping
from contextlib import suppress

import click

from ..model import probe_spec
from ..model.duration import Duration, Value
from ..model.errors import UsageError
from ..model.handoff_modes import ALIVE_S
from ..model.lazy_dataclass import frozen
from ..model.ready_kinds import NEED_ANSWER
from ..model.share import read_percent
from ..model.text import shortened, whole
from ..system.spawn import RLIMITS

_SIZES = {"K": 1024, "M": 1024**2, "G": 1024**3}
#: Every process needs more memory than this.
_LEAST_SIZE = 1024**2
#: The limit of numbers: a larger number is surely a mistake.
_MOST = 10**15


@frozen
class Ready:
    """A value of --ready, which says how a worker shows that it is ready; see Settings."""

    kind: str
    after_s: float | None = None
    fd: int = -1
    check: str = ""
    question: str = ""


def _not_empty(text: str) -> str:
    # An unset variable of a script is the usual reason.
    if not text:
        raise ValueError("it is empty; leave the option out, or write a value")
    return text


def _ready(text: str) -> Ready:
    kind, _, rest = text.partition(":")
    if text in ("notify", "ack"):
        return Ready(kind)
    if kind == "after" and rest:
        return Ready(kind, after_s=TIME.read(rest))
    if kind == "fd" and (fd := whole(rest, 1023) or 0) >= 3:
        return Ready(kind, fd=fd)
    if kind == "check" and rest.strip():
        return Ready(kind, check=rest)
    if kind in NEED_ANSWER:
        probe_spec.refuse_unclear(text)
        return Ready(probe_spec.read(text).kind, ALIVE_S, question=text)
    raise ValueError(
        f"{text!r}: write notify, ack, fd:N (3 to 1023), accept, http:/path, check:COMMAND or "
        "after:1s"
    )


def _health(text: str) -> str:
    probe_spec.read_health(text)
    probe_spec.refuse_unclear(text)
    return text


def _settle_check(text: str) -> str:
    """Return the text of --settle-check, with a bare command written as `check:COMMAND`."""
    check = probe_spec.read_settle_check(text)
    probe_spec.refuse_unclear(text)
    if text.strip()[-1:] == ":" and text.strip()[:-1].isidentifier():
        raise ValueError(f"{text!r}: neither a command nor http:/path, https:/path")
    return f"{probe_spec.CHECK}:{check.path}" if check.kind == probe_spec.CHECK else text


def _signal(text: str) -> int:
    """Return 15 for `TERM`, `SIGTERM` or `term`."""
    try:
        number = signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"]
    except KeyError:
        raise ValueError(f"{text!r} is not a signal; write a name such as TERM or QUIT") from None
    if number in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"{text!r} cannot be caught, so a worker could not finish")
    return number


def _pair(text: str) -> tuple[str, str]:
    name, separator, content = text.partition("=")
    if not separator or not name:
        raise ValueError(f"{text!r} is not NAME=VALUE")
    return name, content


def _names(text: str) -> tuple[str, ...]:
    found = tuple(filter(None, (each.strip() for each in text.split(","))))
    for each in found:
        if "=" in each:
            raise ValueError(f"{each!r}: write only a name; --env sets a value")
        if each.split() != [each]:
            raise ValueError(f"{each!r}: write commas between names")
    return found


def _share(text: str) -> tuple[int, int]:
    """Return after how many connections a worker retires, and the variation of this number.

    The result is (1000, 100) for `1000+-100`, and (1000, 0) for `1000`.
    """
    number, _, spread = text.partition("+-")
    share, jitter = whole(number, _MOST), whole(spread or "0", _MOST)
    if share is not None and jitter is not None and (jitter < share or share == jitter == 0):
        return share, jitter
    raise ValueError(f"{text!r}: write 1000 or 1000+-100")


def _surge(text: str) -> tuple[int, bool]:
    """Return a number and whether it is a percentage: (25, True) for `25%`, (2, False) for `2`."""
    number = whole(text.removesuffix("%"), 100 if text.endswith("%") else 1_000_000)
    if not number:
        raise ValueError(f"{text!r}: write a number of workers from 1, or 1% to 100%")
    return number, text.endswith("%")


def _size(text: str) -> int:
    """Return the bytes of `500M`, `2G`, `65536K` or a plain number."""
    word = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = _SIZES.get(word[-1:], 1)
    digits = word[:-1] if word[-1:] in _SIZES else word
    number = whole(digits, (2**63 - 1) // unit)
    if number is None:
        raise ValueError(f"{text!r} is not a size; write 500M, 2G or bytes")
    if 0 < number * unit < _LEAST_SIZE:
        raise ValueError(f"{text!r} is less than any worker needs; write 500M, 2G or 0 for never")
    return number * unit


def octal(text: str) -> int:
    """Return a mode or umask that is written in octal, as in a shell."""
    with suppress(ValueError):
        if 0 <= (number := int(text, 8)) <= 0o777:
            return number
    raise ValueError(f"{text!r} is not octal, like 022")


FLAG = click.BOOL
TEXT = click.STRING
NOT_EMPTY = Value("TEXT", _not_empty)
TIME = Duration()
TIME_ABOVE_0 = Duration(zero=False)
#: An interval of probes, with a lower limit because each probe costs a connection or a process.
TIME_EACH = Duration(least_s=0.1)
#: A limit for an answer.  A shorter limit would only measure how busy the machine is.
TIME_TO_ANSWER = Duration(least_s=0.01)
HEALTH = Value("http:PATH|accept|check:CMD", _health)
READY = Value("notify|ack|fd:N|accept|http:PATH|check:CMD|after:TIME", _ready)
SETTLE_CHECK = Value("check:CMD|http:PATH", _settle_check)
SIGNAL = Value("SIGNAL", _signal, lambda number: signal.Signals(number).name.removeprefix("SIG"))
PAIR = Value("NAME=VALUE", _pair)
NAMES = Value("NAME,...", _names, lambda names: ",".join(names) or "none")
SHARE = Value("N[+-J]", _share)
SIZE = Value("SIZE", _size)
CANARY = Value("SHARE", read_percent)
SURGE = Value("N|P%", _surge)
OCTAL = Value("OCTAL", octal, "{:04o}".format)


def limit(name: str, text: str) -> int:
    """Return the value of a resource limit or of `nice`.

    Raises UsageError if the name is unknown, or the text is not an allowed number.
    """
    option = f"--limit {name}={shortened(text)}"
    if name not in (*RLIMITS, "nice"):
        raise UsageError(f"--limit {name}: unknown; allowed: nofile, core, nice")
    low, high = (-20, 19) if name == "nice" else (0, 2**63 - 1)
    unlimited = text == "unlimited" and name == "core"
    try:
        value = resource.RLIM_INFINITY if unlimited else int(text)
    except ValueError:
        raise UsageError(f"{option}: not a whole number; write e.g. 1024") from None
    if not (unlimited or low <= value <= high):
        raise UsageError(f"{option}: must be from {low} to {high}")
    if name == "nice":
        most, _ = resource.getrlimit(resource.RLIMIT_NICE)
        floor = -20 if most == resource.RLIM_INFINITY else min(20 - most, 0)
        if value < floor and os.geteuid() != 0:
            raise UsageError(f"{option}: below 0 needs root, or RLIMIT_NICE raised")
        return value
    _, hard = resource.getrlimit(RLIMITS[name])
    if hard != resource.RLIM_INFINITY and (unlimited or value > hard):
        raise UsageError(f"{option}: the hard limit is {hard}; raise that")
    return value


def nofile_of_workers(environment: Mapping[str, str]) -> int:
    """Return the soft limit of descriptors that workers get without --limit nofile.

    By default workers get our own limit.  If the protector needs a higher limit than its workers,
    the unit sets SOCKETPROTECTOR_NOFILE to the workers' limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = environment.get("SOCKETPROTECTOR_NOFILE", "")
    if not (wanted.isascii() and wanted.isdigit()):
        return soft
    limit = whole(wanted, hard)
    return hard if limit is None else limit
