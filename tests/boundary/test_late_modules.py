"""Late modules come from the version that started, with no file, and without memory from a reserve.

Each in a process of its own, with a copy of the package that is removed once it has started.
"""

from __future__ import annotations

import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from socketprotector.system.late_modules import LATE
from tests.copies import copy_package
from tests.running import DEADLINE_S, ROOT

#: Starts as the resident process does, in a package that is gone then.
BEGIN = f"""
import os, resource, shutil, sys
from socketprotector.system import late_modules, late_stdlib
late_stdlib.defer("re")
late_modules.keep()
from socketprotector.daemon import resident
from socketprotector.daemon.delivery.queue import queue_delivery
from socketprotector.daemon.delivery.shared import shared_delivery
shutil.rmtree(sys.argv[1] + "/socketprotector")
def late(name):
    return sys.modules["socketprotector." + name]
def load(name):
    late(name).whatever_there_is
def is_loaded(name):
    return type(late(name)).__name__ == "module"
LATE = {LATE!r}
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name in ("socketprotector", "client_lib/socketprotector_client"):
        copy_package(ROOT / name, tmp_path / Path(name).name)
    return tmp_path


def run(package: Path, code: str) -> str:
    """What a process says that runs this in the copy of the package, after it has begun."""
    ended = subprocess.run(
        [sys.executable, "-c", BEGIN + code, package],
        env={**os.environ, "PYTHONPATH": str(package)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert not ended.stderr
    return ended.stdout


#: Keeps the code as it is, compressed, or, without a free descriptor, again as it is.
PACKED = {
    "stored": "",
    "packed": "assert [*late_modules.pack()]",
    "scarce": """
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
assert not [*late_modules.pack()]
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
""",
}


@pytest.mark.parametrize("packed", PACKED)
def test_each_late_module_is_loaded_without_any_file(package: Path, packed: str) -> None:
    code = (
        PACKED[packed]
        + """
opened = []
sys.addaudithook(lambda event, args: opened.append(args) if event == "open" else None)
before = {*sys.modules}
for name in LATE:
    try:
        load(name)
    except AttributeError as error:
        print(name, late(name).__file__ == sys.argv[1] + "/socketprotector/"
            + name.replace(".", "/") + ".py", is_loaded(name))
print(opened, sorted({*sys.modules} - before))
"""
    )
    *loaded, last = run(package, code).splitlines()

    assert loaded == [f"{name} True True" for name in LATE]
    assert last == "[] []"


def kept_bytes(package: Path, code: str) -> int:
    """The size of all memfds of kept code."""
    measures = """
folder = "/proc/self/fd/"
kept = [each for each in os.listdir(folder) if os.path.exists(folder + each)]
print(sum(os.stat(folder + fd).st_size for fd in kept if "sp.late" in os.readlink(folder + fd)))
"""
    return int(run(package, code + measures))


@pytest.mark.costly
def test_packed_code_takes_less_memory(package: Path) -> None:
    stored = kept_bytes(package, "")
    copy_package(ROOT / "socketprotector", package / "socketprotector")

    assert 0 < kept_bytes(package, PACKED["packed"]) < 0.6 * stored


def test_a_file_of_bytecode_counts_if_it_is_of_this_source(package: Path) -> None:
    """Python itself compares the same two values: the source's size and time."""
    source = package / "socketprotector" / "model" / "known_servers.py"
    code = "from socketprotector.model import known_servers as k\nprint(k.advice, k.__file__)\n"
    code += "print(k.whence.__code__.co_filename)"
    whence = source.read_text() + "\ndef whence() -> None: ...\n"
    for number, text in enumerate((f"{whence}advice = 'old'\n", f"{whence}advice = 'new'\n")):
        source.unlink()  # its file is also that of other copies
        source.write_text(text)
        os.utime(source, (number, number))
        if not number:
            py_compile.compile(str(source), dfile="/elsewhere.py")
            shutil.copytree(package / "socketprotector", package / "first")
            assert run(package, code) == f"old {source}\n{source}\n"
            shutil.copytree(package / "first", package / "socketprotector")

    assert run(package, code) == f"new {source}\n{source}\n"


@pytest.mark.parametrize("packed", PACKED)
def test_regular_expressions_are_loaded_without_any_file(package: Path, packed: str) -> None:
    code = (
        PACKED[packed]
        + """
opened = []
sys.addaudithook(lambda event, args: opened.append(args) if event == "open" else None)
import re
print(re.compile("(?i)a+|[b-d]").match("AAb")[0], "_sre" in sys.modules, opened)
"""
    )
    assert run(package, code) == "AA True []\n"


def test_a_name_of_a_late_module_is_what_its_module_says(package: Path) -> None:
    code = """
from socketprotector.model import known_servers
print(is_loaded("model.known_servers"))
print(known_servers.advice.__code__.co_filename == known_servers.__file__)
print(known_servers is late("model.known_servers"), is_loaded("model.known_servers"))
"""
    assert run(package, code) == "False\nTrue\nTrue True\n"


def test_without_memory_one_is_loaded_from_the_reserve(package: Path) -> None:
    code = """
def fill():
    kept = []
    try:
        for size in (1 << 20, 1 << 12, 400):
            try:
                while True:
                    kept.append(bytes(size))
            except MemoryError:
                pass
    except MemoryError:
        pass
    return kept
import gc; gc.disable()
known = late("model.known_servers")
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (1 << 20), hard))
kept = fill()
try:
    late_modules._reserve.clear() if "none" in sys.argv else None
    kept += fill() if "none" in sys.argv else []
    advice = known.advice
    said = "loaded"
except MemoryError:
    said = "MemoryError"
kept = None
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
print(said, known.advice.__name__)
"""
    assert run(package, code) == "loaded advice\n"
    # Without the reserve it fails, and the next use tries again.
    assert run_again(package, code.replace('"none" in sys.argv', "True")) == "MemoryError advice\n"


def run_again(package: Path, code: str) -> str:
    copy_package(ROOT / "socketprotector", package / "socketprotector")
    return run(package, code)


def test_the_process_forgets_only_annotations_and_docstrings(package: Path) -> None:
    code = """
from socketprotector.daemon.supervisor import Supervisor
from socketprotector.model.settings import Settings
print(Supervisor.run.__annotations__, Supervisor.__doc__, resident.__doc__)
from socketprotector.model.text import in_units
print(in_units.__doc__, Supervisor.run.__code__.co_consts[0], in_units(90))
print(Settings("name", ("sh",), "") == Settings("name", ("sh",), ""))
"""
    assert run(package, code) == "{} None None\nNone None 1m30s\nTrue\n"
