"""Run simulations: `python -m tests.simulation --seed N --steps N` replays one with a trace."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

from tests.simulation.handed import Handed
from tests.simulation.world import World

#: Steps of one life: long enough for a dozen reloads.
STEPS = 2000
#: Seeds that may fail before it gives up.
FAILURES = 10
#: By --handoff.
KINDS: dict[str, type[World]] = {"connection": World, "listener": Handed}
HANDOFF = "of all lives; else the seed chooses"


def life(seed: int, steps: int, handoff: str, note: Callable[[str], None] | None = None) -> World:
    """Return a protector's life that has not begun yet."""
    if handoff == "any":
        handoff = random.Random(f"handoff {seed}").choice(tuple(KINDS))
    return KINDS[handoff](seed, steps, note)


def main() -> int:
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of a set of words is part of what happens.
        command = [sys.executable, "-m", "tests.simulation", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONHASHSEED": "0"})
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument(
        "--seed", type=int, nargs="+", help="replay this one, and trace it; or these"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of one life")
    parser.add_argument("--first", type=int, default=1, help="the first seed of many")
    parser.add_argument("--total", type=int, default=1_000_000, help="steps in all")
    parser.add_argument("--minutes", type=float, help="so long, instead of so many steps")
    parser.add_argument("--handoff", choices=(*KINDS, "any"), default="any", help=HANDOFF)
    parser.add_argument("--verbose", action="store_true", help="with tracebacks")
    arguments = parser.parse_args()
    if arguments.seed is not None and len(arguments.seed) == 1:
        life(arguments.seed[0], arguments.steps, arguments.handoff, print).live()
        return 0
    began, done = time.process_time(), 0
    ends = time.monotonic() + (arguments.minutes or 0.0) * 60
    seen: Counter[str] = Counter()
    events: Counter[str] = Counter()
    tried: list[int] = []
    failed: list[int] = []

    def goes_on() -> bool:
        if len(failed) == FAILURES:
            return False
        return done < arguments.total if arguments.minutes is None else time.monotonic() < ends

    def chosen() -> Iterator[int]:
        yield from arguments.seed or ()
        following = count(arguments.first)
        while arguments.seed is None and goes_on():
            yield next(following)

    for seed in chosen():
        tried.append(seed)
        world = life(seed, arguments.steps, arguments.handoff)
        try:
            world.live()
        except Exception as error:
            failed.append(seed)
            print(f"seed {seed} (step {world.steps}): {type(error).__name__}: {error}", flush=True)
            if arguments.verbose:
                traceback.print_exception(error, limit=-8)
        done += max(1, world.steps)
        seen.update(connections=world.connections, kills=world.kills, faults=world.faults)
        seen.update(turns=world.turns, upgrades=world.upgrades, unguarded=world.unguarded)
        events.update(world.events)
        seen.update({f"lost: {why}": count for why, count in world.lost.items()})
    took = time.process_time() - began
    print(f"{done} steps, seeds {tried[0]} to {tried[-1]}, {took:.0f} s of CPU")
    if arguments.verbose:
        print(dict(events.most_common()))
    print(f"{done / took:.0f} steps/s; {dict(seen)}; failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
