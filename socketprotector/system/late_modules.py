"""What the resident process loads or starts later, as it is now; what it forgets of each module.

An idle protector never uses most of LATE.  Each module there is imported whole, as in
`from ..model import known_servers`; the first name that is looked up in it loads it.  By then an
upgrade may have replaced the package's files.  So the code of the version that started is kept,
compiled, in one memfd: to load it takes no file and no descriptor.  It takes memory, of which
there is a reserve.  Programs that may be started later are there as text: the interpreter, too, may
have been replaced.

Nothing in the resident process reads annotations, the docstrings of modules and classes, or where a
module was found.  Without them an idle protector is 0.3 MB smaller.
"""

from __future__ import annotations

import _frozen_importlib_external as importing
import marshal
import os
import sys
from types import FunctionType, ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from typing import Any

_PACKAGE = __name__.partition(".")[0]
#: All that are late, without the package's name.
LATE = (
    "core.waiting",
    "daemon.asker_client",
    "daemon.asking",
    "daemon.config_reader",
    "daemon.control.commands",
    "daemon.control.status",
    "daemon.health",
    "daemon.recovery",
    "daemon.relay_client",
    "daemon.probe",
    "daemon.settle_check",
    "daemon.verdicts",
    "daemon.watch_client",
    "model.known_servers",
    "model.waits",
    "system.accept_marks",
    "system.bpf",
    "system.reuseport_group",
    "system.reuseport",
    "system.sock_diag",
    "system.socket_copy",
    "system.socket_file",
)
#: Programs that the resident process starts (system/helper.py), of programs/.
PROGRAMS = ("asker.py", "file_watch.py", "log_relay.py")
#: Where each is kept: descriptor, length, offset.
_programs: dict[str, tuple[int, int, int]] = {}
#: Address space without memory behind it, until the system has no other (`ulimit -v`): more than
#: all of LATE needs.
_RESERVE_BYTES = 2 * 1024 * 1024
_reserve: list[bytes] = []


class _Loader(importing.SourceFileLoader):
    """Loads a module of the package, which then forgets what only tools read."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _forget(module)


class Finder:
    """Finds modules of the package as Python does, for a loader of ours."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where a module of the package is; None for any other module."""
        if path is None or not name.startswith(f"{_PACKAGE}."):
            return None
        spec = importing.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importing.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Late(ModuleType):
    """A module that is loaded when its first name is looked up."""

    def __getattr__(self, name: str) -> Any:
        # The import machinery itself asks for names like __path__ and must not load it.
        if name.startswith("__"):
            raise AttributeError(name)
        _load(self)
        return getattr(self, name)


def keep() -> None:
    """Keep the code of late modules as it is now, and put stand-ins in their places.

    Raises OSError.
    """
    sys.meta_path.insert(0, Finder)
    kept = os.memfd_create("sp.late", os.MFD_CLOEXEC)
    end = 0
    for each in LATE:
        name = f"{_PACKAGE}.{each}"
        parent = name.rpartition(".")[0]
        __import__(parent)
        spec = Finder.find_spec(name, sys.modules[parent].__path__)
        if spec is None or not isinstance(spec.loader, _Loader):
            continue  # from an archive: it is loaded as any other
        code = _write(kept, marshal.dumps(spec.loader.get_code(name)), end)
        module = _Late(name)
        module.__spec__, module.__loader__ = spec, spec.loader
        module.__file__, module.__package__ = spec.origin, parent
        vars(module)["__kept__"] = code
        end += code[1]
        sys.modules[name] = module
    for program in PROGRAMS:
        with open(_path_of(program), "rb") as file:
            _programs[program] = _write(kept, file.read(), end)
        end += _programs[program][1]
    _fill_reserve()


def program(name: str) -> tuple[str, bytes]:
    """Return the path of one of PROGRAMS, and its text, as it was kept.  Raises OSError."""
    path = _path_of(name)
    if name in _programs:
        return path, os.pread(*_programs[name])
    with open(path, "rb") as file:  # by a process that keeps nothing
        return path, file.read()


def _path_of(program: str) -> str:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.join(package, "programs", program)


def _write(kept: int, text: bytes, end: int) -> tuple[int, int, int]:
    """Append to the memfd; return what pread() takes to read it.  Raises OSError."""
    if os.pwrite(kept, text, end) < len(text):
        raise OSError(28, "no memory to keep the code of late modules")
    return kept, len(text), end


def load_all() -> None:
    """Load every late module: what is wrong in one of them is raised."""
    for each in LATE:
        module = sys.modules.get(f"{_PACKAGE}.{each}")
        if isinstance(module, _Late):
            _load(module)


def _load(module: ModuleType) -> None:
    """Make a module of a stand-in.  Raises MemoryError, and then it is a stand-in still."""
    before = {**vars(module)}
    for last in (False, True):
        try:
            exec(marshal.loads(os.pread(*before["__kept__"])), vars(module))
            break
        except BaseException as error:
            vars(module).clear()
            vars(module).update(before)
            if last or not isinstance(error, MemoryError) or not _reserve:
                raise
            _reserve.clear()
    module.__class__ = ModuleType
    _forget(module)
    _fill_reserve()


def _fill_reserve() -> None:
    try:
        if not _reserve:
            _reserve.append(bytes(_RESERVE_BYTES))  # calloc(3): no page is touched
    except MemoryError:
        pass  # the next module that is loaded tries again


def _forget(module: ModuleType) -> None:
    """Drop annotations, the docstrings of the module and its classes, and how it was found."""
    module.__doc__ = module.__spec__ = module.__loader__ = None
    vars(module).pop("__cached__", None)
    _forget_in(vars(module), module.__name__)


def _forget_in(names: Mapping[str, Any], module: str) -> None:
    for value in names.values():
        kind = type(value)
        if kind is FunctionType:
            del value.__annotations__
        elif kind is property:
            for one in (value.fget, value.fset):
                if type(one) is FunctionType:
                    del one.__annotations__
        elif kind is classmethod or kind is staticmethod:
            if type(value.__func__) is FunctionType:
                del value.__func__.__annotations__
        elif kind is type and value.__module__ == module:
            _forget_in(vars(value), module)
            value.__doc__ = None
            if "__annotations__" in vars(value):
                del value.__annotations__
