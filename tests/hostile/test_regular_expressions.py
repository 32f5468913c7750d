"""Each regular expression that meets text from others takes time in proportion to its length.

All that are in the code are in one of the two lists below.  Those in FOREIGN are tried with 64 KB
of what is worst for them, and the processor time is compared with that of a simple expression on
the same text: linear ones need a few times as much, quadratic ones thousands of times.
"""

from __future__ import annotations

import ast
import re
import time
from pathlib import Path
from typing import Any

import pytest
from socketprotector_exporter import agent

from socketprotector.ctl import cli
from socketprotector.model import known_servers

ROOT = Path(__file__).parents[2]
BYTES = 65_536
EXPORTER = "socketprotector_exporter"
#: Linear ones need up to 3 times as much; a quadratic one 80 times, with a sixteenth of the text.
MOST = 20
_USES = {"compile", "match", "fullmatch", "search", "findall", "finditer", "sub", "split"}

#: Module and name (or the first characters) of expressions on text of the operator, the kernel or
#: this product alone.
OWN = {
    r"ctl/discovery.py \s*(\d{1,9})\s*$",  # 64 bytes of a file
    *(r"ctl/orders.py [+-]?\d{1,9}", "ctl/orders.py (?:(generation|pid):)?"),
    *("demo/load.py PID", "demo/load.py AUTOMATIC"),
    *(
        f"{EXPORTER}/token_file.py _TOKEN",
        f"{EXPORTER}/web.py " + "0?[0-7]{3}",
    ),
    *(
        "launch/config_file.py _DIGITS",
        "launch/config_file.py _NAMED",
        "launch/config_file.py _OPTION",
        "launch/config_file.py _PLACE",
    ),
    *(r"launch/kernel_calls.py \d+", "launch/listen_spec.py _HOST"),
    "launch/listen_spec.py _NAMED",
    *(r"launch/options.py (?<![\w-])[a-z][a-z-]*\b(?!:)",),
    *(f"launch/server_hints.py {name}" for name in ("_PLAIN", "_NAMED", "_SECRET")),
    *(f"launch/socket_options.py {name}" for name in ("_NUMBER", "_TIME", "_KEEPALIVE")),
    *("launch/toml_lines.py _OPAQUE", "launch/toml_lines.py _MARK", "launch/toml_lines.py \n"),
    *("model/duration.py _SEVERAL", "model/listen_fds.py _PLACEHOLDER"),
    *(f"model/known_servers.py {name}" for name in ("_SOCKET_OPTIONS", "_PRELOADS", "_PYTHON")),
    *(f"model/known_servers.py {name}" for name in ("_CLUSTERED", "_SEVERAL", "_CONFIGURED")),
    *(f"model/known_servers.py {name}" for name in ("_TCP_ALONE", "_TAKES_ALL")),
    *("model/probe_spec.py _URL", "model/probe_spec.py _NO_STATUS"),
    *("system/check_command.py _PROGRAM", "system/env_file.py _NAME"),
    "programs/file_watch.py _BESIDE",  # the path of a changed file
    "system/socket_file.py _NAME",  # a path of 108 bytes, or a file name of 255, as a whole
    "socketprotector_client/gevent.py watched",
}
#: The same, for text from others -> pairs of what a worst case begins with, and what it repeats.
FOREIGN: dict[str, tuple[re.Pattern[str] | re.Pattern[bytes], tuple[tuple[str, str], ...]]] = {
    "model/known_servers.py _TAKEN": (
        known_servers._TAKEN,
        (("", "address already in us"), ("", "errno 98"), ("", "os error 98_"), ("", "EADDRINUS")),
    ),
    "model/known_servers.py _NO_LISTENER": (
        known_servers._NO_LISTENER,
        (("", "invalid argumen"), ("", "EINVAL_"), ("", "LISTEN_FD"), ("", "(os error 9")),
    ),
    "model/known_servers.py _REFUSED": (
        known_servers._REFUSED,
        (("", "Connection refuse"), ("", "Connection refused"), ("", "a\n"), ("", "Exceptio")),
    ),
    "ctl/cli.py _COMMAND": (cli._COMMAND, (("", "`status "), ("`status ", "a"), ("", "`"))),
    f"{EXPORTER}/agent.py _WORD": (agent._WORD, (("", "a"), ("", "-"), ("", "a "))),
}


def _told(node: ast.Call) -> str:
    """The expression itself, or the name that it has."""
    given = node.args[0]
    if not isinstance(given, ast.Constant):
        return ast.unparse(given)
    return given.value.decode() if isinstance(given.value, bytes) else str(given.value)


def used() -> set[str]:
    """Each use of an expression: its file, and its name or the expression."""
    found = set()
    folders = (
        ROOT / "socketprotector",
        ROOT / "client_lib" / "socketprotector_client",
        ROOT / "exporter" / "socketprotector_exporter",
    )
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            file = str(path.relative_to(folder if folder == folders[0] else folder.parent))
            named: set[ast.Call] = set()
            if not re.search("^import re$", text := path.read_text(), re.MULTILINE):
                continue
            tree = ast.parse(text)
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                    calls = [each for each in ast.walk(node.value) if _compiles(each)]
                    if calls and isinstance(target, ast.Name) and target.id.lstrip("_").isupper():
                        found.add(f"{file} {target.id}")
                        named.update(each for each in calls if isinstance(each, ast.Call))
            found |= {
                f"{file} {_told(node)}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and _compiles(node) and node not in named
            }
    return found


def _compiles(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _USES
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "re"
    )


def ratio(pattern: re.Pattern[str] | re.Pattern[bytes], text: str) -> float:
    """How many times as much processor time it takes as to look at each character once."""
    is_bytes = isinstance(pattern.pattern, bytes)
    given: Any = text.encode() if is_bytes else text
    simple: re.Pattern[Any] = re.compile(b"[^x]" if is_bytes else "[^x]")
    times = []
    for each in (simple, pattern):
        began = time.process_time()
        for _ in each.finditer(given):
            pass
        times.append(time.process_time() - began)
    return times[1] / times[0]


def test_each_expression_is_in_one_of_the_lists() -> None:
    known, found = OWN | FOREIGN.keys(), used()
    strange = [use for use in found if not any(use.startswith(each) for each in known)]
    gone = [each for each in known if not any(use.startswith(each) for use in found)]

    assert not strange, "new: is its text from others?"
    assert not gone


@pytest.mark.parametrize("name", FOREIGN)
def test_those_on_text_from_others_are_linear(name: str) -> None:
    pattern, cases = FOREIGN[name]
    for head, repeated in cases:
        text = head + repeated * (BYTES // len(repeated))
        assert ratio(pattern, text) < MOST, (head, repeated)


def test_one_that_is_not_would_be_found() -> None:
    """With a sixteenth of the text: what ACK was once looked for with."""
    pattern = re.compile(r"""^\s*:?["']?pid["']?\s*:\s*(\d{1,10})\s*$""", re.MULTILINE)

    assert ratio(pattern, "\n" * (BYTES // 16)) > MOST
