"""What the tests of frameworks start, and where it listens."""

from __future__ import annotations

from pathlib import Path

from tests.procfs import ports_of
from tests.running import ROOT, eventually

PROGRAMS = Path(__file__).parent / "programs"
GUNICORN = (
    *("-m", "gunicorn", "-c", "python:socketprotector_client.gunicorn", "-b", "ADDRESS"),
    *("--no-control-socket", "--worker-tmp-dir", "/dev/shm", "--log-level", "warning"),
    "tests.frameworks.programs.pages:wsgi",
)
PATH = {"PYTHONPATH": f"{ROOT}:{ROOT / 'client_lib'}", "PYTHONWARNINGS": "default"}


def port_of(pid: int) -> int:
    """Wait until it listens, and return on which port."""
    found: list[int] = []

    def listens() -> bool:
        found.extend(ports_of(pid))
        return bool(found)

    eventually(listens, "it listens")
    return found[0]
