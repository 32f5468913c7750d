"""What the resident process does without, and what that saves."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import needs
from tests.running import ROOT


def run(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    ).stdout


def test_a_deferred_module_is_loaded_at_its_first_use() -> None:
    said = run(
        "from socketprotector.system import late_stdlib as lazy\n"
        "import sys\n"
        "lazy.defer('inspect')\n"
        "import inspect\n"
        "print('dis' in sys.modules)\n"
        "def f(a: int) -> str: ...\n"
        "print(inspect.signature(f))\n"
        "print('dis' in sys.modules)\n"
        "import inspect as again\n"
        "print(again is not inspect, again.signature is inspect.signature)\n"
    )

    assert said == "False\n(a: int) -> str\nTrue\nTrue True\n"


def test_patterns_are_named_without_re_and_compiled_at_their_first_match() -> None:
    said = run(
        "import sys\n"
        "from socketprotector.system import late_stdlib\n"
        "late_stdlib.defer('re')\n"
        "import json, re\n"
        "number = re.compile('[a-f]([0-9]+)', re.IGNORECASE)\n"
        "from socketprotector.model import codec, control_requests, json_text, settings\n"
        "print(json_text.parse(b' {\"a\": [1, null]} '), '_sre' in sys.modules)\n"
        "print(number.search('xB42')[1], number.fullmatch('b'), '_sre' in sys.modules)\n"
        "print(json.loads(' [1]'), re.sub('a', 'b', 'a'))\n"
    )

    assert said == "{'a': [1, None]} False\n42 None True\n[1] b\n"


def test_without_descriptors_for_re_the_next_match_loads_it() -> None:
    said = run(
        "import sys\n"
        "from socketprotector.system import late_stdlib\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 're' and scarce:\n"
        "            raise OSError(24, 'Too many open files')\n"
        "late_stdlib.defer('re')\n"
        "import re\n"
        "found = re.compile('a')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "for scarce in (True, False):\n"
        "    try:\n"
        "        print(found.match('a')[0])\n"
        "    except OSError as error:\n"
        "        print(error)\n"
    )

    assert said == "[Errno 24] Too many open files\na\n"


def test_ctrl_c_while_the_demo_is_loaded_is_the_status_of_one_that_was_interrupted() -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, signal, sys\n"
            "from socketprotector import __main__ as ours\n"
            "class Finder:\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        if name == 'socketprotector.demo.cli':\n"
            "            os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Finder())\n"
            "sys.argv[1:] = ['demo', '--help']\n"
            "ours.main()\n",
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("package", "loaded", "name", "status"),
    [
        ("socketprotector", "launch.cli", "SocketProtector", 111),
        ("socketprotector.ctl", "queries", "socketprotectorctl", 1),
        ("socketprotector_exporter", "main", "socketprotector-exporter", 111),
    ],
    ids=["SocketProtector", "ctl", "exporter"],
)
@pytest.mark.parametrize(
    "error", ["MemoryError", "ImportError('x.so: failed to map segment', path='x.so')"]
)
def test_without_memory_to_load_it_says_so_in_one_line(
    package: str, loaded: str, name: str, status: int, error: str
) -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "class Finder:\n"
            "    def find_spec(self, name, path, target=None):\n"
            f"        if name == '{package}.{loaded}':\n"
            f"            raise {error}\n"
            "sys.meta_path.insert(0, Finder())\n"
            f"sys.path.append({str(ROOT / 'exporter')!r})\n"
            f"from {package}.__main__ import main\n"
            "main()\n",
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert ended.returncode == status
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"{name}: out of memory")
    assert line.endswith(": raise the limit (ulimit -v, LimitAS= of a unit), or free some")


def test_a_module_that_is_there_is_not_deferred() -> None:
    assert run(
        "from socketprotector.system import late_stdlib as lazy\nimport json\n"
        "lazy.defer('json')\nprint(json.dumps(1))"
    )


@needs.unless(sys.version_info < (3, 12), "Python 3.11, whose dataclasses use less of inspect")
def test_the_resident_process_never_needs_inspect() -> None:
    said = run(
        "from socketprotector.system import late_stdlib as lazy\n"
        "import sys\n"
        "lazy.defer('inspect')\n"
        "import socketprotector.daemon.resident\n"
        "print('dis' in sys.modules)\n"
    )

    assert said == "False\n"
