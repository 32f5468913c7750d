"""python -I -m socketprotector.stdio --at-once N [--of POOLS] [--shell] [--file PATH] -- COMMAND

Started by SocketProtector as a worker.  Exit status 2: used in a wrong way; 111: COMMAND cannot
be started, or a system call failed.
"""

from __future__ import annotations

import _signal as signal
import os
import sys

from socketprotector_client import wire

from .environment import Environments
from .pool import Pool
from .report import NAME, Board, Notifier, say
from .spawn import starter_of

USAGE = f"usage: {NAME} --at-once N [--of POOLS] [--shell] [--file PATH] -- COMMAND [ARG...]"


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class UsageError(Exception):
    """Called in a way that cannot work; the text says what to do."""


def main() -> None:
    try:
        sys.exit(run(sys.argv[1:]))
    except UsageError as error:
        say(str(error))
        sys.exit(2)
    except OSError as error:
        say(f"cannot go on: {error}")
        sys.exit(111)


def run(words: list[str]) -> int:
    """Serve until the end and return the exit status; raises UsageError or OSError."""
    values, shell, command = parsed(words)
    at_once, pools = number(values, "--at-once", 0), number(values, "--of", 1)
    environ = os.environ
    if wire.ENV_CHANNEL not in environ:
        raise UsageError(
            f"no {wire.ENV_CHANNEL} in the environment: it is SocketProtector that starts this "
            "program (SocketProtector --handoff stdio LISTEN -- COMMAND)"
        )
    if at_once < pools:
        raise UsageError(f"--at-once {at_once} --of {pools}: each pool needs a place")
    channel, line = (inherited(environ, name) for name in (wire.ENV_CHANNEL, wire.ENV_RETURN))
    inherited(environ, wire.ENV_SCOREBOARD)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide how programs end
    try:
        starter = starter_of(command, shell, values.get("--file", ""))
    except OSError as error:
        say(f"cannot start {error.filename or command[0]}: {error.strerror}")
        return 111
    notifier = Notifier(environ.get(wire.ENV_NOTIFY, ""))
    usec, slot = environ.get("WATCHDOG_USEC", ""), environ.get(wire.ENV_WORKER, "")
    pool = Pool(
        channel,
        line,
        places_of(at_once, pools, int(slot) if slot.isdecimal() else 0),
        starter=starter,
        environments=Environments(dict(os.environb), environ.get(wire.ENV_LISTENERS, "")),
        notifier=notifier,
        board=Board(environ.get(wire.ENV_SCOREBOARD, "")),
        word_every_s=int(usec) / 2_000_000 if usec.isdecimal() else 0.0,
    )
    # Who is not heard is killed after --start-timeout, so there is nothing better to do meanwhile.
    notifier.tell(f"READY=1\n{wire.RETIRES_ON_RETURN}", wait=True)
    pool.run()
    return 0


def parsed(words: list[str]) -> tuple[dict[str, str], bool, list[str]]:
    """Return (values of options, whether --shell, the command)."""
    if "--" not in words or words[-1] == "--":
        raise UsageError(f"no COMMAND after --; {USAGE}")
    end = words.index("--")
    options, command = words[:end], words[end + 1 :]
    shell, values = False, {}
    while options:
        option = options.pop(0)
        if option == "--shell":
            shell = True
        elif option in ("--at-once", "--of", "--file") and options:
            values[option] = options.pop(0)
        else:
            raise UsageError(f"unknown option, or no value: {option}; {USAGE}")
    if shell and len(command) > 1:
        raise UsageError("--shell takes COMMAND as one word: put it in quotes")
    return values, shell, command


def number(values: dict[str, str], option: str, default: int) -> int:
    text = values.get(option, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{option} {text}: a number from 1 on is needed; {USAGE}")
    return int(text)


def inherited(environ: Mapping[str, str], name: str) -> int:
    """Return the descriptor that a variable names, and keep it from the programs; -1: none."""
    text = environ.get(name, "").partition(":")[0]
    if not text.isdecimal():
        return -1
    os.set_inheritable(int(text), False)
    return int(text)


def places_of(at_once: int, pools: int, slot: int) -> int:
    """Return how many of all places are this pool's.  One that was added later brings its own."""
    return at_once // pools + (slot < at_once % pools) if slot < pools else 1


if __name__ == "__main__":
    main()
