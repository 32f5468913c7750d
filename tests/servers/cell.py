"""One trial with one server outside of pytest, in a process of its own: a cell of the table."""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path

import pytest

from bench.processes import free_port
from tests.running import Protector, mark
from tests.servers.catalogue import SERVERS
from tests.servers.trials import TRIALS, Place


def cell(name: str, title: str) -> tuple[str, str]:
    """Try it; return what the table is to say, and what has failed; or nothing, and why."""
    started: list[Protector] = []
    try:
        with tempfile.TemporaryDirectory(prefix="sp-") as folder, mark() as marks:
            os.environ["XDG_RUNTIME_DIR"] = folder

            def start(*words: str, **environment: str) -> Protector:
                started.append(Protector(words, {**marks, **environment}))
                return started[-1]

            at = Place(
                SERVERS[name],
                start,
                Path(folder),
                free_port,
                reloads=20,
                answers=1000,
                clients=8,
                pause_s=0.005,
            )
            at.server.needed()
            try:
                seen = TRIALS[title](at)
                kinds = "".join(f"  {n} x {kind}\n" for kind, n in seen.failures.items())
                return seen.cell, kinds
            finally:
                for each in started:
                    each.end()
    except (Exception, pytest.skip.Exception):
        logs = "\n".join(each.log.text() for each in started)
        return "", f"{traceback.format_exc()}\n{logs}\n"
