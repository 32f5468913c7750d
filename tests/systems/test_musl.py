"""musl's C library instead of glibc (Alpine): a Python linked against it, and what it answers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import needs
from tests.running import ROOT
from tests.systems.life import ELSEWHERE, Surroundings, lived

SOURCE = Path(__file__).with_name("musl.c")


@pytest.mark.costly
@pytest.mark.parametrize("mode", ["connection", "listener"])
def test_a_whole_life_where_the_c_library_answers_as_musl_does(
    tmp_path: Path, marked_environment: dict[str, str], mode: str
) -> None:
    """A library that is preloaded answers for it: always to be had, where there is a compiler."""
    compiler = shutil.which("gcc")
    if compiler is None:
        needs.skip("gcc")
    library = tmp_path / "musl.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE], check=True)

    lived(Surroundings(tmp_path, marked_environment, mode=mode, more={"LD_PRELOAD": str(library)}))


@pytest.mark.parametrize("mode", ["connection", "listener"])
@pytest.mark.parametrize("through", [(), (*ELSEWHERE, "--no-proc", "--")], ids=["", "no /proc"])
def test_a_whole_life_with_musl(
    tmp_path: Path, marked_environment: dict[str, str], through: tuple[str, ...], mode: str
) -> None:
    folder = os.environ.get("MUSL_PYTHON", "")
    if not folder:
        needs.skip("a CPython with musl", "see make test-musl")
    python = Path(folder).absolute() / "bin" / "python3"
    script = "import os; os.sched_getscheduler(0)"
    told = subprocess.run([python, "-c", script], capture_output=True, check=False, text=True)
    assert "Function not implemented" in told.stderr, "that is not linked against musl"
    path = f"{ROOT}:{ROOT / 'client_lib'}"

    lived(
        Surroundings(
            tmp_path,
            marked_environment,
            through,
            python=(str(python),),
            mode=mode,
            more={"PYTHONPATH": path},
        )
    )
