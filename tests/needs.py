"""What a test needs that not every machine has: one name for each need, and one way to skip.

    pytestmark = needs.ROOT                     a mark, for a test or a module
    @needs.programs("unshare", "ip")
    needs.skip("mounts", error)                 in a test that finds it out

The summary of a run counts the tests that were skipped by need (tests/summary.py).  No other
module skips: tests/test_needs.py looks.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from tests.summary import NEEDS

_ROOT = Path(__file__).resolve().parent.parent


def reason(need: str, detail: object = "") -> str:
    """Return the reason of a skip: the need, by which the summary counts, and any detail."""
    return f"{NEEDS}{need}: {detail}" if str(detail) else f"{NEEDS}{need}"


def unless(met: bool, need: str, detail: object = "") -> pytest.MarkDecorator:
    """Return a mark that skips a test if a need is not met."""
    return pytest.mark.skipif(not met, reason=reason(need, detail))


def skip(need: str, detail: object = "") -> NoReturn:
    """Skip the test that runs, because a need is not met."""
    pytest.skip(reason(need, detail))


def programs(*names: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test unless each program is installed."""
    missing = [each for each in names if shutil.which(each) is None]
    return unless(not missing, ", ".join(missing) or "programs")


def module(name: str, *, outside_of_tests: bool = False) -> ModuleType:
    """Import a module, or skip the test or, outside of tests, the file."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(reason(name), allow_module_level=outside_of_tests)


def is_reachable(*paths: str | Path) -> bool:
    """Return whether every user may go to each path."""
    parents = {each for path in paths for each in Path(path).absolute().parents}
    parents |= {each for path in paths for each in Path(path).resolve().parents}
    return all(each.stat().st_mode & 0o001 for each in parents)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


IS_ROOT = os.geteuid() == 0
_OTHERS = "a clone and a Python that other users can execute"

ROOT = unless(IS_ROOT, "root")
#: Root that becomes another user, or starts a program as one.  Seen when the test begins: in the
#: world of a run others can go where they cannot outside.
ANOTHER_USER = pytest.mark.usefixtures("_another_user") if IS_ROOT else ROOT


def root_with(*names: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test unless root runs it and each program is installed."""
    return programs(*names) if IS_ROOT else ROOT


def _has_localhost() -> bool:
    try:
        return "localhost" in Path("/etc/hosts").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


LOCALHOST = unless(_has_localhost(), "localhost in /etc/hosts")
IPV6 = unless(_has_ipv6(), "IPv6")


@cache
def others_can_run() -> bool:
    """Return whether other users can run this Python and the programs of this clone."""
    return bool(Path(__file__).stat().st_mode & 0o004) and is_reachable(
        __file__, f"{sys.prefix}/bin/python", sys.executable, f"{sys.base_prefix}/lib"
    )


def another_user() -> None:
    """Skip the test that runs unless it may run this clone as another user."""
    if not IS_ROOT:
        skip("root")
    if not others_can_run():
        skip(_OTHERS, _ROOT)
