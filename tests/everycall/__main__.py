"""`make everycall`: one fault at each system call of each line of Python, in each operation.

A first run of each operation finds the sites.  Results are appended to a file, so that a second
run goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.everycall.trials import Trial, found_sites, report, trials, try_one
from tests.running import ROOT


def digest_of_sources() -> str:
    """Return a name for the code as it is now."""
    digest = hashlib.sha256()
    for package in (ROOT / "socketprotector", ROOT / "client_lib" / "socketprotector_client"):
        for path in sorted(package.rglob("*.py")):
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
    # Lines of other sources are other sites.
    folder: Path = arguments.folder.absolute() / digest_of_sources()
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * arguments.minutes
    names = [each for each in arguments.only.split(",") if each]
    sites = found_sites(folder, names)
    results = folder / "results.jsonl"
    text = results.read_text() if results.exists() else ""
    done = {tuple(json.loads(line)["trial"]) for line in text.splitlines()}
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
        with writing, results.open("a") as file:
            file.write(json.dumps(outcome) + "\n")
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


if __name__ == "__main__":
    main()
