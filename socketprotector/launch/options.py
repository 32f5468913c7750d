"""How the values of options are read: durations, NAME=VALUE pairs, limits, umasks.

For cli.py only.  Whatever is wrong is said in one line with what may be written instead.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import click

from ..model.duration import Duration
from ..model.errors import UsageError
from ..model.frozen import frozen

_SIZES = {"K": 1024, "M": 1024**2, "G": 1024**3}
#: More is a mistake.
_MOST = 10**15
_LIMITS = {"nofile": resource.RLIMIT_NOFILE, "core": resource.RLIMIT_CORE}
#: The original program's long options, which began with one dash.
_SINGLE_DASH = ("-pid-file", "-foreground", "-verbose")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split at the first `--`, which click would drop; give old long options their second dash."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    options = [
        f"-{word}" if word.partition("=")[0] in _SINGLE_DASH else word for word in words[:at]
    ]
    return options, words[at + 1 :]


@frozen
class Ready:
    """What says that a worker is ready; see Settings."""

    kind: str
    after_s: float | None = None
    fd: int = -1
    check: str = ""


def ready(ctx: click.Context, param: click.Parameter, value: str | None) -> Ready | None:
    """`notify`, `ack`, `fd:N`, `check:COMMAND` or `after:DURATION`; None where none is given."""
    if value is None:
        return None
    kind, _, rest = value.partition(":")
    if value in ("notify", "ack"):
        return Ready(kind)
    if kind == "after" and rest:
        return Ready(kind, after_s=Duration().convert(rest, param, ctx))
    if kind == "fd" and rest.isascii() and rest.isdigit() and 3 <= int(rest) < 1024:
        return Ready(kind, fd=int(rest))
    if kind == "check" and rest.strip():
        return Ready(kind, check=rest)
    raise click.BadParameter(
        f"{value!r}: write notify, ack, fd:N (3 to 1023), check:COMMAND or after:1s", ctx, param
    )


def signal_number(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """`TERM`, `SIGTERM` or `term` -> 15; None where none is given."""
    if value is None:
        return None
    name = value.upper().removeprefix("SIG")
    try:
        number = signal.Signals[f"SIG{name}"]
    except KeyError:
        raise click.BadParameter(f"{value!r}: no signal; write TERM, QUIT, ...", ctx, param) from (
            None
        )
    if number in (signal.SIGKILL, signal.SIGSTOP):
        raise click.BadParameter(f"{value!r}: a worker could not finish anything", ctx, param)
    return number


def pairs(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, any number of times; the last of a name holds."""
    found = {}
    for each in value:
        name, separator, content = each.partition("=")
        if not separator or not name:
            raise click.BadParameter(f"{each!r} is not NAME=VALUE", ctx, param)
        found[name] = content
    return found


def names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """`A,B` -> ("A", "B"); None where nothing is given."""
    if value is None:
        return None
    found = tuple(filter(None, (each.strip() for each in value.split(","))))
    for each in found:
        if "=" in each:
            raise click.BadParameter(f"{each!r}: a name alone; for a value take --env", ctx, param)
    return found


def share(ctx: click.Context, param: click.Parameter, value: Any) -> tuple[int, int]:
    """`1000` or `1000+-100` -> (1000, 100); nothing -> (0, 0)."""
    if value is None:
        return 0, 0
    number, _, spread = str(value).partition("+-")
    if number.isdecimal() and (spread or "0").isdecimal():
        found = int(number), int(spread or "0")
        if found[1] < found[0] <= _MOST:
            return found
    raise click.BadParameter(f"{value!r}: write 1000 or 1000+-100", ctx, param)


def size(ctx: click.Context, param: click.Parameter, value: Any) -> int:
    """`500M`, `2G`, `65536K` or bytes; nothing -> 0."""
    if value is None:
        return 0
    text = str(value).strip().upper().removesuffix("IB").removesuffix("B")
    unit = _SIZES.get(text[-1:], 1)
    digits = text[:-1] if text[-1:] in _SIZES else text
    if digits.isdecimal() and 0 < int(digits) * unit < 2**63:
        return int(digits) * unit
    raise click.BadParameter(f"{value!r} is no size; write 500M, 2G or bytes", ctx, param)


def octal(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """An umask, as the shell writes it."""
    try:
        number = int(value, 8) if value is not None else 0
    except ValueError:
        number = -1
    if not 0 <= number <= 0o777:
        raise click.BadParameter(f"{value!r} is not octal, like 022", ctx, param)
    return number if value is not None else None


def limits(written: Mapping[str, str]) -> tuple[dict[str, int], int]:
    """Return the resource limits and the nice value asked for, which can be had.

    Raises UsageError for what is unknown, no number, or more than is allowed.
    """
    found = {name: _limit(name, value) for name, value in written.items()}
    nice = found.pop("nice", 0)
    for name, value in found.items():
        _, hard = resource.getrlimit(_LIMITS[name])
        unlimited = resource.RLIM_INFINITY
        if hard != unlimited and (value == unlimited or value > hard):
            raise UsageError(
                f"--limit {name}={written[name]}: the hard limit is {hard}; raise that"
            )
    floor = 20 - resource.getrlimit(resource.RLIMIT_NICE)[0]
    if nice < min(floor, 0) and os.geteuid() != 0:
        raise UsageError(f"--limit nice={nice}: below 0 needs root, or RLIMIT_NICE raised")
    return found, nice


def nofile_of_workers(environment: Mapping[str, str]) -> int:
    """Return the soft limit of descriptors that workers get where nobody asks for another one.

    It is ours, or what a unit says whose protector needs a higher one before it can raise it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = environment.get("SOCKETPROTECTOR_NOFILE", "")
    return min(int(told), hard) if told.isascii() and told.isdigit() else soft


def _limit(name: str, value: str) -> int:
    if name not in (*_LIMITS, "nice"):
        raise UsageError(f"--limit {name}: unknown; allowed: nofile, core, nice")
    if value == "unlimited" and name == "core":
        return resource.RLIM_INFINITY
    try:
        number = int(value)
    except ValueError:
        raise UsageError(f"--limit {name}={value}: not a whole number") from None
    low, high = (-20, 19) if name == "nice" else (0, 2**63 - 1)
    if not low <= number <= high:
        raise UsageError(f"--limit {name}={value}: must be from {low} to {high}")
    return number
