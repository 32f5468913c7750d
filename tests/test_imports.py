"""Which folder may import which: they are the layers; what the resident process never loads."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from socketprotector_client import wire

from socketprotector.ctl import api
from socketprotector.model import handoff_modes
from socketprotector.system.late_modules import LATE
from tests.together import together

#: To parse the code costs more than the tests: one process does it.
pytestmark = pytest.mark.xdist_group("imports")
ROOT = Path(__file__).parents[1]
DAEMON = ROOT / "socketprotector"
CLIENT = ROOT / "client_lib" / "socketprotector_client"
EXPORTER = ROOT / "exporter" / "socketprotector_exporter"

#: Each costs the resident process memory for life (design: idle in 16 MB).
HEAVY = {
    *{
        "array",
        "asyncio",
        "attr",
        "click",
        "concurrent",
        "ctypes",
        "daemon",
        "email",
        "http",
        "lockfile",
    },
    *{"logging", "multiprocessing", "pathlib", "prometheus_client", "psutil", "rich", "shutil"},
    *{"ssl", "subprocess", "tempfile", "threading", "typing", "urllib", "uuid", "watchfiles"},
    *{"copy", "inspect", "selectors", "weakref", "zipfile"},
}
#: Modules of this package that it needs only in some modes, or never.
RARE = (*LATE, "programs.log_relay", "system.socket_snapshot")


#: What neither decides nor is a plain value.  `time` and `signal` are there by name for what is a
#: function of its arguments.
IMPURE = {
    *{"asyncio", "fcntl", "logging", "os", "random", "resource", "select", "signal", "socket"},
    *{"subprocess", "sys", "time"},
}
PURE_NAMES = {"signal": {"Signals"}, "time": {"gmtime", "strftime"}}


def dotted(path: Path) -> str:
    """`daemon.control.server`; `daemon.control` for that folder's `__init__`."""
    parts = path.relative_to(DAEMON).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted(DAEMON.rglob("*.py"))}
#: A folder, those in it included.
#: The sample is a link to what stands beside it.
ROOMS = sorted({path.parent.name for path in DAEMON.glob("*/__init__.py")} - {"sample_client"})


def room_of(module: str) -> str:
    """The folder below socketprotector/ that a module is in; "" for those in none."""
    first = module.partition(".")[0]
    return first if first in ROOMS else ""


@cache
def may_import(room: str) -> set[str]:
    """The folders that this one says it may import from."""
    told = re.search(r"May import: ([^.]+)\.", (DAEMON / room / "__init__.py").read_text())
    assert told, f"socketprotector/{room}/__init__.py does not say `May import: FOLDER, FOLDER.`"
    return set(re.findall(r"\w+", told[1])) - {"nothing"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def nodes_of(path: Path) -> dict[type[ast.AST], list[Any]]:
    """All nodes of a module, by their types: to walk through them is what takes the time."""
    found: dict[type[ast.AST], list[Any]] = {}
    for node in ast.walk(parsed(path)):
        found.setdefault(type(node), []).append(node)
    return found


def imports_of(path: Path) -> list[ast.Import | ast.ImportFrom]:
    nodes = nodes_of(path)
    return [*nodes.get(ast.Import, ()), *nodes.get(ast.ImportFrom, ())]


@cache
def names_of(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Each import: the absolute module, and the names taken from it."""
    return names_in(imports_of(path), path)


@cache
def attributes_of(path: Path) -> set[str]:
    """The names of all attributes that a module reads or sets."""
    return {node.attr for node in nodes_of(path).get(ast.Attribute, ())}


def names_in(
    imports: Iterable[ast.Import | ast.ImportFrom], path: Path
) -> list[tuple[str, tuple[str, ...]]]:
    """What some imports of a file import, as names_of()."""
    found: list[tuple[str, tuple[str, ...]]] = []
    package = path.parent.relative_to(ROOT).parts if ROOT in path.parents else ()
    for node in imports:
        if isinstance(node, ast.Import):
            found += [(name.name, ()) for name in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else ()
            words = (*base, *([node.module] if node.module else []))
            found.append((".".join(words), tuple(name.name for name in node.names)))
    return found


@cache
def siblings(module: str) -> set[str]:
    """The modules of the daemon's that one of them imports, however it spells it."""
    return siblings_of(module, imports_of(MODULES[module]))


def siblings_of(module: str, imports: Iterable[ast.Import | ast.ImportFrom]) -> set[str]:
    """Those that some of its imports import."""
    found = set()
    for base, names in names_in(imports, MODULES[module]):
        if base != DAEMON.name and not base.startswith(f"{DAEMON.name}."):
            continue
        inside = base[len(DAEMON.name) + 1 :]
        for name in names or ("",):
            whole = f"{inside}.{name}".strip(".")
            found.add(whole if whole in MODULES else inside)
    return found - {module}


def strangers(path: Path) -> set[str]:
    """The top-level packages from elsewhere that a module imports."""
    packages = {base.partition(".")[0] for base, _ in names_of(path)}
    return packages - {DAEMON.name, CLIENT.parent.name, ""}


def modules_of(package: Path) -> list[str]:
    return sorted(path.stem for path in package.glob("*.py"))


@together("module", [name for name in MODULES if room_of(name)])
def test_a_module_imports_from_the_folders_that_its_own_names(module: str) -> None:
    room = room_of(module)
    taken = {room_of(other) for other in siblings(module)}

    assert taken <= {"", room, *may_import(room)}


@together("room", ROOMS)
def test_a_folder_names_no_more_than_it_needs(room: str) -> None:
    taken = {room_of(o) for m in MODULES if room_of(m) == room for o in siblings(m)}

    assert may_import(room) == taken - {"", room}


def test_no_folders_import_each_other_in_a_circle() -> None:
    waiting = {room: may_import(room) for room in ROOMS}
    while free := [room for room, needs in waiting.items() if not needs & waiting.keys()]:
        for room in free:
            del waiting[room]

    assert not waiting, f"in a circle, or above one: {sorted(waiting)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    waiting = {module: siblings(module) for module in MODULES}
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]

    assert not waiting, f"in a circle, or above one: {sorted(waiting)}"


def test_beside_the_folders_there_is_only_what_starts_the_protector() -> None:
    beside = {module for module in MODULES if not room_of(module)}

    assert beside == {"", "__main__"}


@together("room", [name for name in MODULES if MODULES[name].stem == "__init__"])
def test_a_folder_says_what_lives_there_in_five_lines(room: str) -> None:
    told = ast.get_docstring(parsed(MODULES[room])) or ""

    assert 1 <= len(told.splitlines()) <= 5


@together("module", [m for m in MODULES if room_of(m) in ("core", "model")])
def test_what_decides_knows_no_clock_process_socket_or_logger(module: str) -> None:
    found = {
        base.partition(".")[0]
        for base, names in names_of(MODULES[module])
        if not names or not set(names) <= PURE_NAMES.get(base, set())
    }

    assert not found & IMPURE


def test_decide_is_called_from_one_line_only() -> None:
    calls = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in nodes_of(path).get(ast.Call, ())
        if "decide" in (getattr(node.func, "attr", ""), getattr(node.func, "id", ""))
    ]

    assert len(calls) == 1, calls


def names_a_mode(node: ast.AST) -> bool:
    """Whether an expression is a handoff mode, its name, or what settings call it."""
    match node:
        case ast.Constant(str(word)):
            return word in handoff_modes.MODES
        case ast.Name(word) | ast.Attribute(ast.Name("handoff_modes"), word):
            return word.lower() in handoff_modes.MODES and word.isupper()
        case ast.Attribute(of, "name"):
            return isinstance(of, ast.Name | ast.Attribute) and ast.unparse(of).endswith("mode")
        case ast.Attribute(_, "handoff" | "mode"):
            return True
        case ast.Tuple(parts) | ast.List(parts) | ast.Set(parts):
            return any(map(names_a_mode, parts))
    return False


@together("module", [m for m in MODULES if m != "model.handoff_modes"])
def test_a_handoff_mode_is_asked_what_it_can_do_and_never_for_its_name(module: str) -> None:
    found: list[ast.AST] = []
    nodes = nodes_of(MODULES[module])
    for node in (n for t in (ast.Compare, ast.MatchValue, ast.Subscript) for n in nodes.get(t, ())):
        match node:
            case ast.Compare(left, _, others):
                found += filter(names_a_mode, (left, *others))
            case ast.MatchValue(value):
                found += filter(names_a_mode, [value])
            case ast.Subscript(of, index) if not ast.unparse(of).endswith("MODES"):
                found += filter(names_a_mode, [index])

    assert not found, [f"{module}:{getattr(each, 'lineno', 0)}" for each in found]


#: The ways in which clients reach workers, each a folder behind `daemon.delivery.Delivery`.
DELIVERIES = {dotted(each) for each in (DAEMON / "daemon" / "delivery").glob("*/__init__.py")}


def delivery_of(module: str) -> str:
    """The delivery that a module is a part of; "" for those of none."""
    return next((each for each in DELIVERIES if f"{module}.".startswith(f"{each}.")), "")


@together("module", [m for m in MODULES if m != "daemon.delivery.choice"])
def test_a_delivery_is_known_to_its_own_modules_alone(module: str) -> None:
    assert {delivery_of(other) for other in siblings(module)} <= {"", delivery_of(module)}


#: The modules that act on a capability of a mode after the start, each by its name.
ASKED_FOR = {
    "adapter": {"system.program_spec"},
    "cannot": {"daemon.supervisor"},
    "finish_signal": {
        *{"daemon.assembly", "daemon.post_mortem", "daemon.recovery", "daemon.worker_pool"},
    },
    "pooled": {"daemon.first_programs", "system.program_spec"},
    "workers_accept": {"daemon.delivery.choice", "system.program_spec"},
}
#: The fields of a mode, without those that others have by the same name.
CAPABILITIES = {
    *{*handoff_modes.HandoffMode.__match_args__} - {"name", "ready", "ready_after_s", "workers"},
    *{"finish_signal", "needs_library"},
}


def test_a_capability_is_asked_by_the_modules_that_act_on_it_and_no_others() -> None:
    """Others ask the delivery, or the core, which asks a capability of its policy by name."""
    asked: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if room_of(module) in ("core", "daemon", "programs", "system"):
            for name in attributes_of(path) & CAPABILITIES:
                asked.setdefault(name, set()).add(module)

    assert asked == ASKED_FOR


#: What a listener says of its sockets: a delivery alone asks for it.
SOCKETS = {
    *{"has_sibling", "has_waiting", "is_alive", "reserve", "shared", "socket_for", "sockets"},
    *{"steer"},
}


@together(
    "module",
    [m for m in MODULES if m.startswith("daemon.") and not m.startswith("daemon.delivery")],
)
def test_the_sockets_of_a_listener_are_read_in_a_delivery_alone(module: str) -> None:
    assert not attributes_of(MODULES[module]) & SOCKETS


@together("module", [m for m in MODULES if m.startswith("programs.")])
def test_a_program_of_its_own_needs_only_the_standard_library(module: str) -> None:
    path = MODULES[module]

    assert strangers(path) <= {*sys.stdlib_module_names, "socketprotector_client", "watchfiles"}


#: What other distributions import.
API = "socketprotector.ctl.api"
#: Of socketprotectorctl what asks a control socket.
ASKING = ("api", "client", "discovery", "errors", "fields", "message", "query_all")


@together("name", ASKING)
def test_what_asks_a_control_socket_needs_only_the_standard_library(name: str) -> None:
    own = {each for each in siblings(f"ctl.{name}") if room_of(each) == "ctl"} - {"ctl"}

    assert strangers(MODULES[f"ctl.{name}"]) <= set(sys.stdlib_module_names)
    assert own <= {f"ctl.{each}" for each in ASKING}


def taken_by_the_exporter(module: str) -> dict[str, tuple[str, ...]]:
    """What a module of the exporter imports of socketprotector: names by their module."""
    found = names_of(EXPORTER / f"{module}.py")
    return {base: names for base, names in found if base.partition(".")[0] == DAEMON.name}


@together("module", modules_of(EXPORTER))
def test_the_exporter_imports_the_public_module_of_ctl_and_no_other(module: str) -> None:
    taken = taken_by_the_exporter(module)

    assert taken.keys() <= {DAEMON.name, API}
    assert set(taken.get(DAEMON.name, ())) <= {"__version__"}


def test_the_public_module_of_ctl_has_only_names_that_the_exporter_imports() -> None:
    taken = map(taken_by_the_exporter, modules_of(EXPORTER))

    assert set(api.__all__) == {name for each in taken for name in each.get(API, ())}


@together("module", MODULES)
def test_no_module_imports_the_exporter(module: str) -> None:
    assert EXPORTER.name not in strangers(MODULES[module])


#: Modules of the client library for one framework each, which no other module imports; and
#: the command, which imports the servers only when there is something to serve.
GLUE = {
    "anyio": {"anyio"},
    "gevent": {"gevent"},
    "gunicorn": {"gunicorn"},
    "trio": {"trio"},
    "waitress": {"waitress"},
    "run": {"uvicorn"},
    "uvicorn_turns": {"uvicorn"},
}


@together("module", modules_of(CLIENT))
def test_the_client_library_needs_nothing_but_the_standard_library(module: str) -> None:
    allowed = {"socketprotector_client"} | GLUE.get(module, set())

    assert strangers(CLIENT / f"{module}.py") <= set(sys.stdlib_module_names) | allowed


@together("module", modules_of(CLIENT))
def test_only_the_command_imports_what_is_for_one_framework(module: str) -> None:
    taken = {
        base.split(".")[2]
        for base, names in names_of(CLIENT / f"{module}.py")
        for base in ([base] if base.count(".") > 1 else [f"{base}.{name}" for name in names])
        if base.startswith("client_lib.socketprotector_client.")
    }

    assert module == "run" or not taken & GLUE.keys()


#: stdio's pool and the adapter of legacy are workers, but need no more of it either.
@together("module", MODULES)
def test_no_module_imports_more_of_the_client_library_than_the_wire_format(module: str) -> None:
    taken = {
        name
        for base, names in names_of(MODULES[module])
        if base.partition(".")[0] == "socketprotector_client"
        for name in (names if base == "socketprotector_client" else [base.split(".")[1]])
    }

    assert taken <= {"wire"}


def test_nothing_heavy_or_rare_reaches_the_resident_process() -> None:
    code = """
import sys, types
from socketprotector import __main__ as program
program.inherited.is_ours = lambda: True
def show():
    print(*(name for name, module in sys.modules.items() if type(module) is types.ModuleType))
    sys.exit()
program._loaded = show
program.main()
"""
    # Isolated, and without site: what a .pth file imports is not the daemon's doing.
    path = f"import sys; sys.path[:0] = {[str(ROOT), str(CLIENT.parent)]!r}\n"
    command = [sys.executable, "-I", "-S", "-c", path + code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert "socketprotector.daemon.supervisor" in loaded
    # Since Python 3.12 `dataclasses` uses much of `inspect` when it is imported.
    heavy = HEAVY - ({"inspect"} if sys.version_info >= (3, 12) else set())
    assert not {name.partition(".")[0] for name in loaded} & heavy
    assert not {f"socketprotector.{name}" for name in RARE}.intersection(loaded)


def test_the_resident_process_asks_dataclasses_for_no_fields() -> None:
    """That loads `inspect` or `copy`; model/lazy_dataclass.py has the same without."""
    taken = {
        name
        for module in MODULES
        if room_of(module) in {"daemon", *may_import("daemon")}
        for base, names in names_of(MODULES[module])
        if base == "dataclasses" and module != "model.lazy_dataclass"
        for name in names
    }

    assert taken <= {"KW_ONLY", "field"}


#: What the resident process loads after its start begins, and when.  Anything else must be there
#: from the start: later the package may have been replaced or removed.
LOADED_LATER = {
    # At the start; the other one is never loaded.
    ("daemon.delivery.choice", "daemon.delivery.queue.queue_delivery"),
    ("daemon.delivery.choice", "daemon.delivery.shared.shared_delivery"),
    # In the process of a check, which runs the installed package, and nothing else.
    ("daemon.resident", "system.whole_package"),
}


def test_the_resident_process_needs_no_file_of_its_package_later() -> None:
    found = set()
    for module in MODULES:
        if room_of(module) in {"daemon", *may_import("daemon")}:
            for function in nodes_of(MODULES[module]).get(ast.FunctionDef, ()):
                within = range(function.lineno, function.end_lineno + 1)
                imports = [e for e in imports_of(MODULES[module]) if e.lineno in within]
                found |= {(module, other) for other in siblings_of(module, imports)}

    assert found == LOADED_LATER


#: The modules of the standard library that a worker needs: 9 of the 13 ms of its imports.
OF_A_WORKER = (
    *("atexit", "contextlib", "fcntl", "importlib", "mmap", "resource", "signal", "socket"),
    *("struct", "termios", "threading", "weakref"),
)
#: Prints what is loaded at READY=1.
SERVES = """
import os, sys
from socketprotector_client import serve, worker
def ready(*said):
    print(*sys.modules, flush=True)
    os._exit(0)
worker.notify = ready
serve(print, "127.0.0.1:0")
"""


@pytest.mark.parametrize("has_protector", [True, False])
def test_a_worker_loads_until_it_is_ready_only_what_it_needs(*, has_protector: bool) -> None:
    """It starts at each reload and after each crash, and there is one for each core."""
    path = f"import sys; sys.path[:0] = {[str(CLIENT.parent)]!r}\n"
    given, taken = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with given, taken:
        env = {
            wire.ENV_CHANNEL: str(taken.fileno()),
            wire.ENV_LISTENERS: wire.pack_listeners(["tcp:127.0.0.1:80", "unix:/run/a b"]),
        }
        env = env if has_protector else {}
        command = [sys.executable, "-I", "-S", "-c", path + SERVES]
        loaded = subprocess.check_output(command, text=True, env=env, pass_fds=[taken.fileno()])
    needs = f"import sys, __future__, {', '.join(OF_A_WORKER)}; print(*sys.modules)"
    needed = subprocess.check_output([sys.executable, "-I", "-S", "-c", needs], text=True)

    assert "socketprotector_client.intake" in loaded
    others = {*loaded.split()} - {*needed.split()}
    assert not {each for each in others if not each.startswith("socketprotector_client")}


def test_the_client_library_loads_nothing_large() -> None:
    path = f"import sys; sys.path[:0] = {[str(CLIENT.parent)]!r}; "
    wanted = "import socketprotector_client as made; made.serve, made.Channel, made.Listener; "
    command = [sys.executable, "-I", "-S", "-c", path + wanted + "print(*sys.modules)"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert "socketprotector_client.listener" in loaded
    large = {"asyncio", "dataclasses", "inspect", "logging", "re", "traceback", "typing"}
    assert not large & {*loaded}


@pytest.mark.parametrize(
    "name", ["programs.guard", "programs.stdio.pool", "programs.stdio.__main__"]
)
def test_a_program_that_stays_beside_the_protector_stays_small(name: str) -> None:
    """One is there for each core, or for each protector."""
    code = f"import sys, socketprotector.{name}; print(*sys.modules)"
    path = f"import sys; sys.path[:0] = {[str(ROOT), str(CLIENT.parent)]!r}; "
    command = [sys.executable, "-I", "-S", "-c", path + code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert f"socketprotector.{name}" in loaded
    # 1 MB each; the modules of C below some of these are enough.
    own = HEAVY | {"collections", "contextlib", "dataclasses", "enum", "json", "re", "signal"}
    assert not {each.partition(".")[0] for each in loaded} & (own | {"socket"})


@pytest.mark.parametrize(
    ("asked", "module"), [("is_ours", "daemon.resident"), ("is_for_reader", "launch.reload_child")]
)
def test_garbage_is_looked_for_but_not_among_what_is_imported(asked: str, module: str) -> None:
    code = f"""import gc, sys
from socketprotector import __main__ as program
import socketprotector.{module} as does
program.inherited.{asked} = lambda: True
does.main = lambda: print(gc.isenabled(), gc.get_freeze_count() > 1000)
program.main()"""
    command = [sys.executable, "-c", code]

    assert subprocess.run(command, capture_output=True, text=True).stdout == "True True\n"


def test_no_test_module_is_imported() -> None:
    """What two of them need has a module of its own, where the next one looks for it."""
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for name in re.findall(r"(?m)^\s*from (tests\.\S+) import ", path.read_text("utf-8"))
        if name.rpartition(".")[2].startswith("test_")
    ]
    assert not found
