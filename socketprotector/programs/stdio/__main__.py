"""python -I -m socketprotector.programs.stdio --at-once N [OPTION...] -- COMMAND [ARG...]

SocketProtector starts this program as a worker.  Exit status 2: wrong usage; 111: COMMAND cannot be
started, or a system call failed.
"""

from __future__ import annotations

import _signal as signal
import os
import sys

from socketprotector_client import wire

from ...system import signals
from ..worker_protocol import FAILED, Notifier, Refusal, inherited
from .environment import Environments
from .pool import Pool
from .report import NAME, Board, say
from .spawn import starter_of

USAGE = f"usage: {NAME} --at-once N [--of POOLS] [--shell] [--file PATH] -- COMMAND [ARG...]"


def main() -> None:
    try:
        run(sys.argv[1:])
    except Refusal as error:
        say(str(error))
        sys.exit(error.status)
    except OSError as error:
        say(f"cannot continue: {error}")
        sys.exit(FAILED)
    finally:
        signals.block()  # a later signal could still change the exit status


def run(words: list[str]) -> None:
    """Serve until the pool has drained.  Raises Refusal or OSError."""
    values, shell, command = parsed(words)
    at_once, pools = number(values, "--at-once", 0), number(values, "--of", 1)
    environ = os.environ
    if wire.ENV_CHANNEL not in environ:
        raise Refusal(
            f"no {wire.ENV_CHANNEL} in the environment: only SocketProtector can start this "
            "program (SocketProtector --handoff stdio LISTEN -- COMMAND)"
        )
    if at_once < pools:
        raise Refusal(f"--at-once {at_once} --of {pools}: each pool needs a place")
    channel, line = (inherited(environ, name) for name in (wire.ENV_CHANNEL, wire.ENV_RETURN))
    inherited(environ, wire.ENV_SCOREBOARD)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, it would hide how programs end
    try:
        starter = starter_of(command, shell, values.get("--file", ""))
    except OSError as error:
        what = error.filename or command[0]
        raise Refusal(f"cannot start {what}: {error.strerror}", FAILED) from error
    notifier, slot = Notifier(environ), environ.get(wire.ENV_WORKER, "")
    pool = Pool(
        channel,
        line,
        slots_of(at_once, pools, int(slot) if slot.isdecimal() else 0),
        starter=starter,
        environments=Environments(dict(os.environb), environ.get(wire.ENV_LISTENERS, "")),
        notifier=notifier,
        board=Board(environ.get(wire.ENV_SCOREBOARD, "")),
    )
    notifier.ready()
    pool.run()


def parsed(words: list[str]) -> tuple[dict[str, str], bool, list[str]]:
    """Return the options' values, whether --shell is set, and the command.  Raises Refusal."""
    if "--" not in words or words[-1] == "--":
        raise Refusal(f"no COMMAND after --; {USAGE}")
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
            raise Refusal(f"unknown option, or no value: {option}; {USAGE}")
    if shell and len(command) > 1:
        raise Refusal("--shell takes COMMAND as one word: put it in quotes")
    return values, shell, command


def number(values: dict[str, str], option: str, default: int) -> int:
    text = values.get(option, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise Refusal(f"{option} {text}: a number from 1 on is needed; {USAGE}")
    return int(text)


def slots_of(at_once: int, pools: int, slot: int) -> int:
    """Return how many of the `at_once` programs this pool may run.

    slot: the worker's slot.  While the replaced pool still runs, the slot is `pools` or above.
    """
    return at_once // pools + (slot < at_once % pools)


if __name__ == "__main__":
    main()
