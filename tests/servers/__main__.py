"""Try the unmodified servers, and write what clients have seen into the table of tests/servers.md.

python -m tests.servers [NAME...] [--trial TITLE]... [--jobs N]; all other cells stay as they are.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.servers import table
from tests.servers.catalogue import SERVERS
from tests.servers.cell import cell
from tests.servers.trials import TRIALS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SERVERS))
    parser.add_argument("--trial", action="append", choices=list(TRIALS))
    parser.add_argument("--jobs", type=int, default=3, help="trials at a time")
    given = parser.parse_args()
    names, titles = given.names or list(SERVERS), given.trial or list(TRIALS)
    status = 0
    # A process each: of the control socket's folder, and of what a trial may leave.
    with ProcessPoolExecutor(
        given.jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        tried = {
            pool.submit(cell, name, title): (name, title) for title in titles for name in names
        }
        for each in as_completed(tried):
            name, title = tried[each]
            found, why = each.result()
            print(f"{name}, {title}: {found or 'FAILED'}\n{why}", end="", flush=True)
            if found:
                text = table.PAGE.read_text(encoding="utf-8")
                table.PAGE.write_text(table.write(text, {name: {title: found}}), encoding="utf-8")
            else:
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
