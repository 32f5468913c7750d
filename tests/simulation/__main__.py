"""Run simulations: `python -m tests.simulation --seed N --steps N` replays one with a trace."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from itertools import count
from typing import Any

from tests.simulation.deployed import DEPLOYED, DEPLOYED_STORIES
from tests.simulation.each_step import ListenerStory, Story
from tests.simulation.handed import Handed
from tests.simulation.rolled import ROLLED, ROLLED_STORIES
from tests.simulation.spreading import SPREADING
from tests.simulation.world import World

#: Steps of one life: long enough for a dozen reloads.
STEPS = 2000
#: So many come off stories, unless minutes are said.
LIVES = 1000
#: Seeds that may fail before it gives up.
FAILURES = 10
#: By --handoff.
KINDS: dict[str, type[World]] = {"connection": World, "listener": Handed}
HANDOFF = "of all lives; else the seed chooses"
EACH_STEP = "kill and fail at each system call of stories instead: see each_step.py"
STORIES: dict[str, type[Story]] = {"connection": Story, "listener": ListenerStory}


def handoff_of(seed: int, handoff: str) -> str:
    """Return which one a life has."""
    if handoff != "any":
        return handoff
    return random.Random(f"handoff {seed}").choice(tuple(KINDS))


def life(seed: int, steps: int, arguments: Any, note: Callable[[str], None] | None = None) -> World:
    """Return a protector's life that has not begun yet."""
    chosen = [
        kinds
        for given, kinds in (
            (arguments.deploys, DEPLOYED),
            (arguments.rollouts, ROLLED),
            (arguments.spreads, SPREADING),
        )
        if given
    ]
    kinds = chosen[0] if chosen else KINDS
    return kinds[handoff_of(seed, arguments.handoff)](seed, steps, note)


class Told:
    """What those lives have found that come off a story."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.points: Counter[tuple[str, str]] = Counter()
        self.reached: set[tuple[str, str]] = set()
        self.failed = 0

    def hear(self, its: dict[str, Any]) -> None:
        self.seen.update(lives=1)
        if its["error"]:
            self.failed += 1
            said = f"--seed {its['seed']} --call {its['call']} --fails-with {its['what']}"
            print(f"{said}: {its['error']}, {its['at']}", flush=True)
        names = ("turns", "kills", "faults", "upgrades", "connections")
        self.seen.update({name: its.get(name, 0) for name in names})
        self.seen.update({f"lost: {why}": n for why, n in its.get("lost", {}).items()})
        self.seen.update(its.get("stages", {}))
        for verb, where, number in its.get("points", ()):
            self.points[verb, where] += number
            self.reached.add((verb, where))
        for each in its.get("found", ()):
            self.hear({**each, "call": f"{its['call']}+{each['call'] - its['call']}"})

    def tell(self, seeds: Collection[int]) -> None:
        """Print all, and at how many places of each verb a protector was killed."""
        killed = Counter(verb for verb, _ in self.points)
        for verb, number in sorted(Counter(verb for verb, _ in self.reached).items()):
            print(f"  killed at {killed[verb]} of {number} places of {verb}")
        places = f"killed at {len(self.points)} of {len(self.reached)} places"
        print(f"{len(seeds)} stories, {places}; {dict(self.seen)}")
        print(f"failed: {self.failed}")


def tell_stories(arguments: Any) -> int:
    """Have lives go wrong at each step of stories, or at one that is named."""
    stories = ROLLED_STORIES if arguments.rollouts else STORIES
    stories = DEPLOYED_STORIES if arguments.deploys else stories
    if arguments.call:
        story = stories[handoff_of(arguments.seed[0], arguments.handoff)]
        struck = arguments.call, arguments.fails_with
        story(arguments.seed[0], print, struck=struck, acts=arguments.acts).live()
        return 0
    told = Told()
    tried: list[int] = []
    ends, most = time.monotonic() + (arguments.minutes or 0.0) * 60, arguments.lives or LIVES
    for seed in arguments.seed or count(arguments.first):
        over = time.monotonic() > ends if arguments.minutes else told.seen["lives"] >= most
        if (tried and not arguments.seed and over) or told.failed >= FAILURES:
            break
        tried.append(seed)
        life = stories[handoff_of(seed, arguments.handoff)](
            seed, heard=told.hear, share=arguments.share
        )
        try:
            life.live()
        except Exception as error:
            told.failed += 1
            print(f"--seed {seed} --call 1000000: {type(error).__name__}: {error}", flush=True)
        told.points.update(life.points)
        told.reached.update(life.reached)
    told.tell(tried)
    return 1 if told.failed else 0


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
    parser.add_argument("--rollouts", action="store_true", help="lives with shares and rolling")
    parser.add_argument("--deploys", action="store_true", help="lives with releases")
    parser.add_argument("--spreads", action="store_true", help="lives with --drain-spread")
    parser.add_argument("--lives", type=int, help="so many, instead of so many steps")
    parser.add_argument("--each-step", action="store_true", help=EACH_STEP)
    parser.add_argument("--acts", nargs="+", default=(), help="of a story; else the seed's")
    parser.add_argument("--share", type=float, default=1.0, help="of the calls of stories")
    parser.add_argument("--call", type=int, help="trace the life of --seed that this call ends")
    parser.add_argument("--fails-with", type=int, default=0, help="an errno; 0: a kill")
    parser.add_argument("--verbose", action="store_true", help="with tracebacks")
    arguments = parser.parse_args()
    if arguments.each_step:
        return tell_stories(arguments)
    if arguments.seed is not None and len(arguments.seed) == 1 and not arguments.verbose:
        life(arguments.seed[0], arguments.steps, arguments, print).live()
        return 0
    began, done = time.process_time(), 0
    ends = time.monotonic() + (arguments.minutes or 0.0) * 60
    seen: Counter[str] = Counter()
    events: Counter[str] = Counter()
    killed_at: Counter[str] = Counter()
    tried: list[int] = []
    failed: list[int] = []

    def goes_on() -> bool:
        if len(failed) == FAILURES:
            return False
        if arguments.lives is not None:
            return len(tried) < int(arguments.lives)
        if arguments.minutes is not None:
            return time.monotonic() < ends
        return done < int(arguments.total)

    def chosen() -> Iterator[int]:
        yield from arguments.seed or ()
        following = count(arguments.first)
        while arguments.seed is None and goes_on():
            yield next(following)

    for seed in chosen():
        tried.append(seed)
        world = life(seed, arguments.steps, arguments)
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
        killed_at.update(world.killed_at)
        seen.update({f"lost: {why}": count for why, count in world.lost.items()})
    took = time.process_time() - began
    lives = f"{len(tried)} lives, seeds {tried[0]} to {tried[-1]}"
    print(f"{done} steps, {lives}, {took:.0f} s of CPU")
    if arguments.verbose:
        print(dict(events.most_common()))
        print({"killed in": dict(killed_at.most_common())})
    print(f"{done / took:.0f} steps/s; {dict(seen)}; failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
