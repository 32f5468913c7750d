"""`make everycall`: one fault at each system call of each line of Python, in each operation.

A first run of each operation finds the sites.  Results are appended to a file, so that a second
run goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.everycall.life import OPERATIONS
from tests.everycall.trials import Trial, found_sites, kept_outcomes, report, trials, try_one
from tests.running import ROOT


def digest_of_sources() -> str:
    """Return a name for the code as it is now, and for what is asked of it."""
    digest = hashlib.sha256()
    packages = ("socketprotector", "client_lib/socketprotector_client", "tests/everycall")
    for package in packages:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".c", ".py"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.everycall", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/everycall"))
    parser.add_argument("--minutes", type=float, default=480.0, help="end after so long")
    parser.add_argument("--only", default="", help="an operation, or several with commas")
    parser.add_argument("--site", default="", help="only sites that contain this")
    parser.add_argument("--seed", type=int, default=36, help="the order of the faults")
    parser.add_argument("--jobs", type=int, default=4, help="how many lives run side by side")
    arguments = parser.parse_args()
    names = [each for each in arguments.only.split(",") if each]
    if unknown := set(names) - set(OPERATIONS):
        parser.error(f"--only {','.join(sorted(unknown))}: there are {', '.join(OPERATIONS)}")
    if arguments.jobs < 1:
        parser.error("--jobs: write a number from 1")
    if not arguments.minutes >= 0:
        parser.error("--minutes: write a number from 0")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the lives that run now are ended
    # Lines of other sources are other sites.
    folder: Path = arguments.folder.absolute() / digest_of_sources()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--folder {arguments.folder}: {error.strerror}; choose another")
    until = time.monotonic() + 60 * arguments.minutes
    sites = found_sites(folder, names)
    results = folder / "results.jsonl"
    done = {tuple(each["trial"]) for each in kept_outcomes(results)}
    open_trials = [
        each
        for each in trials(sites, arguments.seed)
        if each not in done and arguments.site in each[1]
    ]
    writing, interrupted = threading.Lock(), threading.Event()

    def run(trial: Trial) -> None:
        if time.monotonic() > until:
            return
        outcome = try_one(folder, trial)
        if interrupted.is_set():
            return  # a terminal's Ctrl-C reaches the processes of this life, too
        # The line begins with a newline, in case a killed run left its last line incomplete.
        with writing, results.open("a") as file:
            file.write(f"\n{json.dumps(outcome)}")
        if outcome["problems"]:
            print(*trial, *outcome["problems"], sep="; ", flush=True)

    # A life waits for processes most of the time.
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = [pool.submit(run, each) for each in open_trials]
        try:
            for each in as_completed(running):
                each.result()
        except KeyboardInterrupt:
            interrupted.set()
            print("The lives that run now come to their end.", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    print(report(sites, results))
    if interrupted.is_set():
        sys.exit(130)
    sys.exit(any(each["problems"] for each in kept_outcomes(results)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.")
        sys.exit(130)
    except (OSError, subprocess.CalledProcessError) as error:  # a full disk, for example
        sys.exit(f"python -m tests.everycall: {error}; the same command goes on from here")
