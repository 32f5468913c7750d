"""Run as a service's user: rewrite what a protector of this user has in its memfds.

Arguments: the protector's pid, and a program that workers are to run as root.  With a third
argument, the command line that a configuration reader is to read (JSON).
"""

from __future__ import annotations

import json
import os
import sys

from socketprotector.core.snapshot import CODEC, Snapshot
from socketprotector.model.lazy_dataclass import replace
from socketprotector.model.settings import Settings, dump, load
from socketprotector.system.state_file import StateFile


def opened(pid: str, name: str) -> int:
    """Open a memfd of the protector."""
    folder = f"/proc/{pid}/fd"
    [found] = [fd for fd in os.listdir(folder) if f"memfd:{name}" in os.readlink(f"{folder}/{fd}")]
    return os.open(f"{folder}/{found}", os.O_RDWR)


def rewritten(settings: Settings, program: str, words: list[str]) -> Settings:
    origin = replace(settings.origin, words=tuple(words)) if words else settings.origin
    return replace(settings, identity=None, worker_identity=None, command=(program,), origin=origin)


def main(pid: str, program: str, words: str = "[]") -> None:
    file = opened(pid, "sp.settings")
    found = rewritten(load(os.pread(file, 1 << 20, 0)), program, json.loads(words))
    os.ftruncate(file, 0)
    os.pwrite(file, dump(found), 0)

    state = StateFile(opened(pid, "sp.state"))
    whole, *changes = state.read()
    snapshot: Snapshot = CODEC.decode(whole, changes)
    settings = replace(snapshot.settings, current=found)
    generations = tuple(
        replace(
            each,
            program=replace(each.program, path=program, argv=(program,), identity=None),
        )
        for each in snapshot.generations
    )
    state.write(CODEC.encode(replace(snapshot, settings=settings, generations=generations)))
    print("written", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
