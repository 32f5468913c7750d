"""Saves memory: loads late modules at their first use, and strips all modules of docstrings.

An idle protector never uses most of LATE.  Such a module is imported whole, as in
`from ..model import known_servers`; the first look-up of a name in it loads it.  By then an
upgrade may have replaced the package's files.  So the compiled code of the running version is kept
in one memfd, compressed.  Loading it needs no file and no descriptor.  It needs memory, for which
there is a reserve.  The memfd also has the late modules of the standard library, and the programs
that we start later: these as source, because the interpreter may have been replaced.

Compressing takes most of the time, and a program that starts or resumes has clients waiting.  So
keep() does not compress, and pack() does it some seconds later.

The resident process never reads annotations, docstrings or a module's location.  Without them an
idle protector is 0.4 MB smaller.
"""

from __future__ import annotations

import _frozen_importlib_external as importing
import marshal
import os
import sys
import zlib
from contextlib import suppress
from types import FunctionType, ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from importlib.machinery import ModuleSpec, SourceFileLoader
    from typing import Any, ClassVar

_PACKAGE = __name__.partition(".")[0]
#: The names of all late modules, relative to the package.
LATE = (
    "daemon.relay_client",  # a dictionary of this module's code makes the others smallest
    "core.rescue",
    "core.stop",
    "core.waiting",
    "daemon.prober_client",
    "daemon.ready_probe",
    "daemon.config_reader",
    "daemon.control.commands",
    "daemon.control.releases",
    "daemon.control.rollout",
    "daemon.control.status",
    "daemon.current_link",
    "daemon.delivery.queue.canary",
    "daemon.delivery.queue.probe_sender",
    "daemon.delivery.shared.canary_watch",
    "daemon.forked_children",
    "daemon.health",
    "daemon.http_exchange",
    "daemon.post_mortem",
    "daemon.recovery",
    "daemon.release_history",
    "daemon.releases",
    "daemon.probe",
    "daemon.settle_check",
    "daemon.spread",
    "daemon.verdicts",
    "daemon.watch_client",
    "daemon.worker_recycling",
    "model.control_requests",
    "model.einhorn",
    "model.exit_text",
    "model.fd_budget",
    "model.http_answer",
    "model.known_servers",
    "model.probe_spec",
    "model.release",
    "model.wait_quantiles",
    "system.accept_tags",
    "system.bpf",
    "system.check_command",
    "system.env_file",
    "system.log_file",
    "system.loopback",
    "system.netlink",
    "system.path_group",
    "system.peer_credentials",
    "system.privileges",
    "system.proc_scan",
    "system.procfs",
    "system.release_store",
    "system.reuseport_group",
    "system.reuseport",
    "system.sock_diag",
    "system.socket_copy",
    "system.socket_file",
)
#: Late modules of the standard library, a package before its modules (system/late_stdlib.py).
STDLIB = ("copyreg", "re", "re._casefix", "re._constants", "re._parser", "re._compiler")
#: The programs in programs/ that the resident process starts (system/helper.py).
PROGRAMS = ("prober.py", "file_watch.py", "log_relay.py", "release_writer.py")
#: When pack() is called after the start.  A program that ends sooner need not compress.
PACK_AFTER_S = 3.0
#: For zlib.compressobj(): level, method, bits of the window, memory.  The code of the first
#: module is the dictionary for all.  So 822 kB become 372 kB in 30 ms; without it, 386 kB.
_COMPRESSION = (6, zlib.DEFLATED, 13, 6)
#: How much to compress at once, and the size of the dictionary.  The buffers for a whole module
#: would also stay in memory.
_PIECE_BYTES = 4096
#: What precedes the code in a .pyc file.
_PYC_HEAD_BYTES = 16
#: A reserve of untouched address space for a shortage (`ulimit -v`): more than all of LATE needs.
_RESERVE_BYTES = 2 * 1024 * 1024
_reserve: list[bytes] = []


class _Kept:
    """A text that is kept in a memfd."""

    __slots__ = ("_fd", "_is_packed", "_length", "_start")

    def __init__(self, fd: int, text: bytes) -> None:
        """Append the text to a memfd.  Raises OSError."""
        self._fd, self._start, self._is_packed = fd, os.fstat(fd).st_size, False
        self._length = _write(fd, text, self._start)

    def read(self) -> bytes:
        """Return the text.  Raises OSError and MemoryError."""
        text = os.pread(self._fd, self._length, self._start)
        if not self._is_packed:
            return text
        return zlib.decompressobj(zdict=os.pread(self._fd, _PIECE_BYTES, 0)).decompress(text)

    def pack(self, fd: int, dictionary: bytes) -> None:
        """Move the text to another memfd, compressed.  Raises OSError and MemoryError.

        dictionary: the first _PIECE_BYTES of that memfd.
        """
        begin, last = os.fstat(fd).st_size, self._start + self._length
        end, compressor = (
            begin,
            zlib.compressobj(*_COMPRESSION, zlib.Z_DEFAULT_STRATEGY, dictionary),
        )
        for start in range(self._start, last, _PIECE_BYTES):
            piece = os.pread(self._fd, min(_PIECE_BYTES, last - start), start)
            end += _write(fd, compressor.compress(piece), end)
        end += _write(fd, compressor.flush(), end)
        self._fd, self._start, self._length, self._is_packed = fd, begin, end - begin, True


def _write(fd: int, text: bytes, place: int) -> int:
    """Write to a memfd at this place; return the number of bytes.  Raises OSError."""
    if os.pwrite(fd, text, place) < len(text):
        raise OSError(28, "no memory to keep the code of late modules")
    return len(text)


#: The memfd that keep() has made, until pack() has compressed all that is in it.
_stored: list[int] = []
#: Program -> its source.
_programs: dict[str, _Kept] = {}


class _Loader(importing.SourceFileLoader):
    """Loads a module of the package, and drops the parts that only tools read."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _forget(module)


class _KeptLoader:
    """Loads a module of the standard library from its kept code."""

    def __init__(self, kept: _Kept) -> None:
        self.kept = kept

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code."""
        exec(marshal.loads(self.kept.read()), vars(module))


class Finder:
    """Finds the package's modules, and gives them our loader; also finds kept modules."""

    #: The specs of kept modules of the standard library.
    stdlib: ClassVar[dict[str, ModuleSpec]] = {}

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a kept module, or of a module of this package; None: any other."""
        if name in Finder.stdlib:
            return Finder.stdlib[name]
        if path is None or not name.startswith(f"{_PACKAGE}."):
            return None
        spec = importing.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importing.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Late(ModuleType):
    """A stand-in for a module, which loads it when a name in it is looked up."""

    def __getattr__(self, name: str) -> Any:
        # The import machinery looks up names like __path__, which must not load the module.
        if name.startswith("__"):
            raise AttributeError(name)
        _load(self)
        return getattr(self, name)


def keep() -> None:
    """Keep the present code of the late modules, and put stand-ins in their places.

    Raises OSError.
    """
    sys.meta_path.insert(0, Finder)
    kept = os.memfd_create("sp.late", os.MFD_CLOEXEC)
    roots = sys.modules[_PACKAGE].__path__
    for each in LATE:
        name = f"{_PACKAGE}.{each}"
        parent = name.rpartition(".")[0]
        # Do not import the parent: it may import late modules that have no stand-in yet.
        folders = parent.split(".")[1:]
        spec = Finder.find_spec(name, [os.path.join(root, *folders) for root in roots])
        if spec is None or not isinstance(spec.loader, _Loader):
            continue  # in an archive: such a module is loaded as usual
        module = _Late(name)
        module.__file__, module.__package__ = spec.origin, parent
        vars(module)["__kept__"] = _Kept(kept, _marshalled(spec.loader, name))
        sys.modules[name] = module
    for program in PROGRAMS:
        with open(_path_of(program), "rb") as file:
            _programs[program] = _Kept(kept, file.read())
    _keep_stdlib(kept)
    _fill_reserve()
    _stored.append(kept)


def pack() -> Iterator[None]:
    """Compress what keep() has kept; yield after each part, so that clients need not wait."""
    # Without free descriptors or memory, some code stays uncompressed.
    with suppress(OSError, MemoryError):
        packed = os.memfd_create("sp.late", os.MFD_CLOEXEC)
        dictionary = os.pread(_stored[0], _PIECE_BYTES, 0)  # of the first late module
        _write(packed, dictionary, 0)
        modules = (sys.modules.get(f"{_PACKAGE}.{each}") for each in LATE)
        loaders: Any = (each.loader for each in Finder.stdlib.values())
        for kept in (
            *(vars(each)["__kept__"] for each in modules if isinstance(each, _Late)),
            *(loader.kept for loader in loaders),
            *_programs.values(),
        ):
            kept.pack(packed, dictionary)
            yield
        os.close(_stored.pop())


def _keep_stdlib(kept: int) -> None:
    folder = None
    for name in STDLIB:
        spec = importing.PathFinder.find_spec(name, folder if "." in name else None)
        if spec is None or not isinstance(spec.loader, importing.SourceFileLoader):
            continue  # frozen, or from an archive
        folder = spec.submodule_search_locations or folder
        code = _Kept(kept, _marshalled(spec.loader, name))
        spec.loader = _KeptLoader(code)  # type: ignore[assignment]
        Finder.stdlib[name] = spec


def _marshalled(loader: SourceFileLoader, name: str) -> bytes:
    """Return the code of a module, as marshal writes it.

    A valid .pyc file contains these bytes after its head.  To load and marshal the code instead
    would add 2 ms to each start.
    """
    with suppress(OSError, NotImplementedError):  # Python may have no place for such files
        stats = loader.path_stats(loader.path)
        numbers = (0, int(stats["mtime"]), stats["size"])  # 0: valid for this time and size
        head = b"".join((each & 0xFFFFFFFF).to_bytes(4, "little") for each in numbers)
        pyc = loader.get_data(importing.cache_from_source(loader.path))
        if pyc.startswith(importing.MAGIC_NUMBER + head):
            return pyc[_PYC_HEAD_BYTES:]
    return marshal.dumps(loader.get_code(name))


def program(name: str) -> tuple[str, bytes]:
    """Return the path and the kept source of one of PROGRAMS.  Raises OSError."""
    path = _path_of(name)
    if name in _programs:
        return path, _programs[name].read()
    with open(path, "rb") as file:  # this process has not called keep()
        return path, file.read()


def _path_of(program: str) -> str:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.join(package, "programs", program)


def load_all() -> None:
    """Load every late module; raise the error of a broken one."""
    for each in LATE:
        module = sys.modules.get(f"{_PACKAGE}.{each}")
        if isinstance(module, _Late):
            _load(module)


def _load(module: ModuleType) -> None:
    """Turn a stand-in into its module.  After a MemoryError it is still a stand-in."""
    before = {**vars(module)}
    for last in (False, True):
        try:
            # Not by marshal, because the code of a copied .pyc file names another source.
            code = importing._compile_bytecode(  # type: ignore[attr-defined]
                before["__kept__"].read(), module.__name__, None, module.__file__
            )
            exec(code, vars(module))
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
        pass  # the next loaded module tries again


def _forget(module: ModuleType) -> None:
    """Drop annotations and docstrings, and the module's location."""
    module.__doc__ = module.__spec__ = module.__loader__ = None
    vars(module).pop("__cached__", None)
    _forget_in(vars(module), module.__name__)


def _forget_in(names: Mapping[str, Any], module: str) -> None:
    for value in names.values():
        kind = type(value)
        if kind is FunctionType:
            _forget_of(value)
        elif kind is property:
            for one in (value.fget, value.fset):
                if type(one) is FunctionType:
                    _forget_of(one)
        elif kind is classmethod or kind is staticmethod:
            if type(value.__func__) is FunctionType:
                _forget_of(value.__func__)
        elif kind is type and value.__module__ == module:
            _forget_in(vars(value), module)
            value.__doc__ = None
            if "__annotations__" in vars(value):
                del value.__annotations__


def _forget_of(function: FunctionType) -> None:
    del function.__annotations__
    code = function.__code__
    # The docstring is also the first constant of the code.  But a wrapper has the docstring of
    # another function.
    if function.__doc__ is not None and code.co_consts[0] is function.__doc__:
        function.__doc__ = None
        function.__code__ = code.replace(co_consts=(None, *code.co_consts[1:]))
