"""Who may import whom: the layers of the daemon, and what never reaches its resident process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DAEMON = ROOT / "socketprotector"
CLIENT = ROOT / "client_lib" / "socketprotector_client"
CTL = DAEMON / "ctl"
EXPORTER = DAEMON / "exporter"
STDIO = DAEMON / "stdio"
#: Its modules that other programs use, too.
CTL_BARE = ("client", "failure", "find", "session", "survey", "verdict")

#: From top to bottom.  A module imports from its own layer and from those below it.
LAYERS = {
    "entry": {
        "__main__",
        "activation",
        "checks",
        "config",
        "cli",
        "launch",
        "left",
        "options",
        "places",
        "reread",
        "reach",
        "resident",
        "suggest",
        "waiting",
    },
    "shell": {
        *{
            "configuration",
            "control",
            "crew",
            "effects",
            "emptying",
            "forwarder",
            "heritage",
            "home",
            "limits",
            "launcher",
            "operate",
            "output",
            "reader",
            "sides",
            "status",
            "supervisor",
            "untaken",
        },
        *{"relaying", "upgrade", "watcher"},
    },
    "core": {"lifecycle", "reload", "workers", "stop", "step"},
    "operating system": {
        *{"address", "bind", "bind_control", "bind_unix", "board", "clock", "fold", "holder"},
        *{"channel", "door", "envfile", "executable", "folder", "guard", "legacy", "listener"},
        *{"groups", "peers", "quota", "twin", "unheard"},
        *{"log", "logfile", "loop", "notify", "notify_folder", "pidfile", "privileges", "proc"},
        *{
            "process",
            "program",
            "readiness",
            "relay",
            "sockopts",
            "state",
            "strays",
            "terminal",
            "watch",
        },
    },
    "values": {
        *{
            "__init__",
            "changes",
            "control_path",
            "einhorn",
            "errors",
            "events",
            "fleet",
            "frozen",
            "handoff",
            "history",
            "lean",
            "line",
            "policy",
            "room",
            "records",
            "snapshot",
            "requests",
            "servers",
            "settings",
        },
        *{"words"},
    },
}
DEPTH = {module: depth for depth, layer in enumerate(LAYERS.values()) for module in layer}

#: These know no clock, process, socket or logger.
PURE = LAYERS["core"] | {"events", "fleet", "frozen", "handoff", "policy", "settings"}
IMPURE = {"asyncio", "logging", "os", "random", "select", "signal", "socket", "sys", "time"}

#: Each costs the resident process memory for life (design: idle in 16 MB).
HEAVY = {
    *{"asyncio", "attr", "click", "concurrent", "ctypes", "daemon", "email", "http", "lockfile"},
    *{"logging", "multiprocessing", "pathlib", "prometheus_client", "psutil", "rich", "shutil"},
    *{"ssl", "subprocess", "tempfile", "threading", "typing", "urllib", "uuid", "watchfiles"},
    *{"zipfile"},
}


def modules_of(package: Path) -> list[str]:
    return sorted(path.stem for path in package.glob("*.py"))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Level (1: the module's own package) and full dotted name of each import."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((0, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
            yield from ((node.level, f"{node.module}.{name.name}") for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, name.name) for name in node.names)


def siblings(module: str) -> set[str]:
    """The daemon's modules that one of them imports, however it spells it."""
    found = set()
    for level, name in imports_of(DAEMON / f"{module}.py"):
        parts = name.split(".")
        if level == 0 and parts[0] == "socketprotector":
            parts = parts[1:] or ["__init__"]
        elif level == 0:
            continue
        found.add(parts[0] if (DAEMON / f"{parts[0]}.py").exists() else "__init__")
    return found


def strangers(path: Path) -> set[str]:
    """The top-level packages from elsewhere that a module imports."""
    return {name.partition(".")[0] for level, name in imports_of(path) if level == 0}


@pytest.mark.parametrize("module", modules_of(DAEMON))
def test_imports_between_the_daemons_modules_go_downward(module: str) -> None:
    assert module in DEPTH, (
        f"socketprotector/{module}.py is in no layer: "
        "add it to LAYERS in tests/core/test_imports.py (and to ARCHITECTURE.md)"
    )

    upward = {
        other for other in siblings(module) if DEPTH.get(other, DEPTH[module]) < DEPTH[module]
    }

    assert not upward, f"{module} imports from a layer above its own: {sorted(upward)}"


def test_the_daemon_is_flat() -> None:
    """The other tests here look at the modules of one folder."""
    assert {path.parent.name for path in DAEMON.glob("*/*.py")} <= {
        *(CTL.name, EXPORTER.name, STDIO.name)
    }


@pytest.mark.parametrize("module", modules_of(DAEMON))
def test_no_module_of_the_daemon_knows_the_programs_beside_it(module: str) -> None:
    names = {name for _, name in imports_of(DAEMON / f"{module}.py")}

    others = {CTL.name, EXPORTER.name, STDIO.name}
    assert not {name for name in names if others & set(name.split("."))}


@pytest.mark.parametrize("module", modules_of(EXPORTER))
def test_the_exporter_takes_of_the_others_what_asks_control_sockets(module: str) -> None:
    taken = {name for level, name in imports_of(EXPORTER / f"{module}.py") if level == 2}
    parts = {".".join(name.split(".")[:2]) for name in taken if name.startswith("ctl.")}

    assert {name.partition(".")[0] for name in taken} <= {
        *("__version__", "control_path", "ctl", "errors", "words")
    }
    assert parts <= {f"ctl.{each}" for each in CTL_BARE}
    assert "socketprotector" not in strangers(EXPORTER / f"{module}.py")


@pytest.mark.parametrize("module", modules_of(CTL))
def test_socketprotectorctl_knows_little_of_the_daemon(module: str) -> None:
    taken = {
        name.partition(".")[0] for level, name in imports_of(CTL / f"{module}.py") if level == 2
    }

    assert taken <= {"__version__", "control_path", "errors", "words", "options"}
    assert "socketprotector" not in strangers(CTL / f"{module}.py")


@pytest.mark.parametrize("module", modules_of(STDIO))
def test_the_pool_takes_of_the_daemon_what_finds_a_program(module: str) -> None:
    taken = {name for level, name in imports_of(STDIO / f"{module}.py") if level == 2}

    assert {name.partition(".")[0] for name in taken} <= {"executable"}
    assert strangers(STDIO / f"{module}.py") <= {
        *sys.stdlib_module_names,
        "socketprotector_client",
    }


@pytest.mark.parametrize("module", CTL_BARE)
def test_what_the_exporter_shares_needs_only_the_standard_library(module: str) -> None:
    own = {name.partition(".")[0] for level, name in imports_of(CTL / f"{module}.py") if level == 1}

    assert strangers(CTL / f"{module}.py") <= set(sys.stdlib_module_names)
    assert own & set(modules_of(CTL)) <= set(CTL_BARE)


def test_no_modules_of_the_daemon_import_each_other_in_a_circle() -> None:
    waiting = {module: siblings(module) - {module} for module in modules_of(DAEMON)}
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]

    assert not waiting, f"in a circle, or above one: {sorted(waiting)}"


@pytest.mark.parametrize("module", sorted(PURE))
def test_what_decides_knows_no_clock_process_socket_or_logger(module: str) -> None:
    assert not strangers(DAEMON / f"{module}.py") & IMPURE
    assert siblings(module) <= PURE


def test_decide_is_called_from_one_line_only() -> None:
    calls = [
        f"{module}:{node.lineno}"
        for module in modules_of(DAEMON)
        for node in ast.walk(ast.parse((DAEMON / f"{module}.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "decide"
    ]

    assert len(calls) == 1, calls


#: Modules of the client library for one framework each, which nobody else imports; and the
#: command, which imports the servers only when there is something to serve.
GLUE = {
    "anyio": {"anyio"},
    "gevent": {"gevent"},
    "gunicorn": {"gunicorn"},
    "trio": {"trio"},
    "waitress": {"waitress"},
    "run": {"uvicorn"},
}


@pytest.mark.parametrize("module", modules_of(CLIENT))
def test_the_client_library_needs_nothing_but_the_standard_library(module: str) -> None:
    allowed = {"socketprotector_client"} | GLUE.get(module, set())

    assert strangers(CLIENT / f"{module}.py") <= set(sys.stdlib_module_names) | allowed


@pytest.mark.parametrize("module", modules_of(CLIENT))
def test_only_the_command_imports_what_is_for_one_framework(module: str) -> None:
    taken = {name.split(".")[0] for level, name in imports_of(CLIENT / f"{module}.py") if level}

    assert module == "run" or not taken & GLUE.keys()


@pytest.mark.parametrize("module", modules_of(DAEMON))
def test_the_daemon_takes_only_the_wire_format_from_the_client_library(module: str) -> None:
    taken = {
        name
        for level, name in imports_of(DAEMON / f"{module}.py")
        if level == 0 and name.startswith("socketprotector_client.")
    }

    assert {name.split(".")[1] for name in taken} <= {"wire"}


def test_nothing_heavy_reaches_the_resident_process() -> None:
    code = "import sys, socketprotector.resident; print(*sys.modules)"
    # Isolated, and without site: what a .pth file imports is not the daemon's doing.
    path = f"import sys; sys.path[:0] = {[str(ROOT), str(CLIENT.parent)]!r}; "
    command = [sys.executable, "-I", "-S", "-c", path + code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert "socketprotector.supervisor" in loaded
    heavy = {name.partition(".")[0] for name in loaded} & HEAVY
    assert not heavy


def test_the_pool_stays_small() -> None:
    code = "import sys, socketprotector.stdio.pool, socketprotector.stdio.__main__; "
    path = f"import sys; sys.path[:0] = {[str(ROOT), str(CLIENT.parent)]!r}; "
    command = [sys.executable, "-I", "-S", "-c", path + code + "print(*sys.modules)"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert "socketprotector.stdio.pool" in loaded
    # 1 MB each; the modules of C below the last two are enough.
    own = HEAVY | {"collections", "dataclasses", "enum", "re", "signal", "socket"}
    assert not {name.partition(".")[0] for name in loaded} & own
