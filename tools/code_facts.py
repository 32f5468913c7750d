"""Facts about the code for the tables of the documents (tools/reference.py).

They are parsed from the source, because no table there has them: the logged events with their
levels and fields, the exit statuses, and the environment variables.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from socketprotector.core.actions import ReportKind  # noqa: E402
from socketprotector.daemon import reports  # noqa: E402
from socketprotector.model.errors import Refusal  # noqa: E402
from socketprotector.model.log_format import LEVELS  # noqa: E402

PACKAGE = ROOT / "socketprotector"
#: The fields that Reports.write() writes for each Report.
_OF_REPORTS = ("generation", "reason", "last_words", "release")
#: The fields of crash-loop, which repeats fields of the last death's lines.
_OF_CRASH_LOOPS = (
    *("generation", "slot", "deaths", "unreported", "for_s", "worker", "how", "reason"),
    "last_words",
)
#: Programs that run as workers; their variables are those of workers (docs/protocol.md).
_WORKERS = ("programs/stdio", "programs/legacy", "programs/worker_protocol.py")

#: Variables that our programs set for themselves, or for a shell's completion.
_OWN = {"SOCKETPROTECTOR_WATCHED_ANEW", "_SOCKETPROTECTOR_COMPLETE"}

Events = dict[str, tuple[list[str], list[str]]]


@cache
def _sources(word: str) -> list[tuple[Path, ast.Module]]:
    """Parse the modules in whose text the word is; parsing all of them takes a second."""
    texts = [(path, path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]
    return [(path, ast.parse(text)) for path, text in texts if word in text]


def _texts(node: ast.expr) -> list[str]:
    """Return the text of a constant, or both texts of `"resumed" if snapshot else "start"`."""
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def _fields(call: ast.Call, function: ast.AST) -> list[str]:
    """Return the names of a call's keywords, including those of a `**fields` made before it."""
    found = []
    for keyword in call.keywords:
        if keyword.arg is not None:
            found.append(keyword.arg)
            continue
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Dict)
                and ast.dump(node.targets[0]).replace("Store", "Load") == ast.dump(keyword.value)
            ):
                found += [text for key in node.value.keys if key for text in _texts(key)]
            elif (
                isinstance(node, ast.Subscript)
                and isinstance(node.ctx, ast.Store)
                and ast.dump(node.value) == ast.dump(keyword.value)
            ):
                found += _texts(node.slice)
    return found


@cache
def log_events() -> Events:
    """Return event -> its levels and fields, from calls like write("info", "ready", ...)."""
    found: Events = {}

    def add(event: str, levels: list[str], fields: list[str]) -> None:
        known = found.setdefault(event, ([], []))
        for have, more in zip(known, (levels, fields), strict=True):
            have += [each for each in more if each not in have]

    later: list[str] = []
    started: list[str] = []
    # Each such call is of write(), _write(), or the guard's log() and start_later().
    for path, module in _sources("write("):
        functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            # A method that writes for its callers: the fields that it adds to theirs.
            adds = [
                _fields(call, function)
                for call in ast.walk(function)
                if _is_call(call, "write") and isinstance(call.args[0], ast.Name)
            ]
            for call in ast.walk(module) if adds else ():
                if _is_call(call, function.name) and set(levels := _texts(call.args[0])) & set(
                    LEVELS
                ):
                    for event in _texts(call.args[1]):
                        add(event, levels, adds[0])
            for call in ast.walk(function):
                if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                    continue
                if path.name == "guard.py" and call.func.attr in ("log", "start_later"):
                    if function.name == "start_later":
                        later = _fields(call, function)
                    for event in _texts(call.args[0]):
                        add(event, ["warning"], _fields(call, function))
                        if call.func.attr == "start_later":
                            started.append(event)
                elif call.func.attr in ("write", "_write") and len(call.args) > 1:
                    levels = _texts(call.args[0])
                    if set(levels) & set(LEVELS):
                        for event in _texts(call.args[1]):
                            add(event, levels, _fields(call, function))
    for event in started:
        add(event, [], later)
    for news in ReportKind:
        add(news.value, [reports._LEVELS.get(news, "info")], list(_OF_REPORTS))
    add("crash-loop", [], list(_OF_CRASH_LOOPS))
    return found


def _is_call(node: ast.AST, name: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
        and len(node.args) > 1
    )


def exit_statuses() -> set[int]:
    """Return the exit statuses of SocketProtector: of its errors, and of the first start."""
    from socketprotector.core.failure import START_FAILED
    from socketprotector.launch import await_verdict
    from socketprotector.launch import cli as _  # noqa: F401 -- defines all errors

    def statuses(kind: type[Refusal]) -> set[int]:
        below = [each for each in kind.__subclasses__() if ".ctl." not in each.__module__]
        return {kind.status}.union(*map(statuses, below))

    return {0, START_FAILED, await_verdict._INTERRUPTED} | statuses(Refusal)


def environment() -> set[str]:
    """Return the environment variables that SocketProtector itself reads."""
    found: set[str] = set()
    for path, module in _sources("environ"):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(_WORKERS):
            for function in ast.walk(module):
                if isinstance(function, ast.FunctionDef):
                    for key in _keys(function):
                        found.update(_values(key, function, name))
    return found - _OWN


def _is_environment(node: ast.expr) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name in ("environ", "environment")


def _keys(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """Yield the expression NAME of environ.get(NAME), environ[NAME] and NAME in environ."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("get", "pop") and _is_environment(node.func.value):
                yield node.args[0]
        elif isinstance(node, ast.Subscript) and _is_environment(node.value):
            if isinstance(node.ctx, ast.Load):
                yield node.slice
        elif isinstance(node, ast.Compare) and _is_environment(node.comparators[0]):
            yield node.left


def _values(key: ast.expr, function: ast.FunctionDef, module: str) -> set[str]:
    """Return the possible values of a key: a text, a constant of the module, or several texts."""
    if isinstance(key, ast.Constant):
        return {str(key.value)}
    for node in ast.walk(function):
        if isinstance(node, ast.comprehension) and ast.unparse(node.target) == ast.unparse(key):
            key = node.iter
    module_name = "socketprotector." + module.removesuffix(".py").replace("/", ".")
    scope = vars(importlib.import_module(module_name.removesuffix(".__init__")))
    try:
        value = eval(compile(ast.Expression(key), module, "eval"), scope)
    except NameError:
        return set()  # an argument: the caller has the name
    return {value} if isinstance(value, str) else set(value)
