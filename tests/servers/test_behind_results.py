"""The results of servers behind proxies: the file that a run adds to, and its tables."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.servers.behind_results import NOT_RUN, Cell, Count, add, read, tables

NODE = Cell("node", "unix", "nginx", False, 4)
STARLET = Cell("starlet", "unix", "nginx", False, 4)
OVER_TCP = Cell("node", "tcp", "nginx", False, 4)
KEPT = Cell("node", "unix", "nginx", True, 4)
MANY = Cell("node", "unix", "nginx", False, 64)
RESET = "ConnectionResetError: [Errno 104] Connection reset by peer"


def test_a_file_that_is_not_there_has_no_results(tmp_path: Path) -> None:
    assert read(tmp_path / "results") == {}


def test_parts_of_several_runs_add_up_to_a_cell_and_a_later_one_replaces_an_earlier(
    tmp_path: Path,
) -> None:
    file = tmp_path / "results"
    add(file, NODE, {"20 reloads": Count(7)})
    add(file, KEPT, {"20 reloads": Count(9, Counter({RESET: 2}))})
    add(file, NODE, {"20 reloads": Count(8), "USR2": Count(3, Counter({RESET: 1}))})

    assert read(file) == {
        NODE: {"20 reloads": Count(8), "USR2": Count(3, Counter({RESET: 1}))},
        KEPT: {"20 reloads": Count(9, Counter({RESET: 2}))},
    }


def test_the_tables_have_each_cell_of_the_reloads_and_sums_of_other_parts_that_were_run() -> None:
    found = {
        NODE: {"20 reloads": Count(1000), "USR2": Count(100)},
        MANY: {"20 reloads": Count(5), "USR2": Count(11, Counter({RESET: 1}))},
        KEPT: {"20 reloads": Count(7, Counter({RESET: 2, "end of file": 1}))},
        STARLET: {"20 reloads": Count(6)},
        OVER_TCP: {"20 reloads": Count(4)},
    }

    assert tables(found) == (
        "| server | over | nginx, 4 | nginx, 64 | nginx, kept, 4 | nginx, kept, 64 |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        f"| node | unix | 0 of 1,000 | 0 of 5 | 3 of 7 | {NOT_RUN} |\n"
        f"| node | tcp | 0 of 4 | {NOT_RUN} | {NOT_RUN} | {NOT_RUN} |\n"
        f"| starlet | unix | 0 of 6 | {NOT_RUN} | {NOT_RUN} | {NOT_RUN} |\n"
        "\n"
        "| server | over | connections | USR2 |\n"
        "| --- | --- | --- | --- |\n"
        "| node | unix | single | 1 of 111 |\n"
    )
