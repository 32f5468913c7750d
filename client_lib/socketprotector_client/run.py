"""socketprotector-run MODULE:APP: serve an unmodified ASGI or WSGI application.

uvicorn, on asyncio's event loop, serves ASGI; waitress serves WSGI.  Both are extras of this
distribution.  Only the server that is needed is loaded.

Exit statuses: 0 drained, 2 wrong use or a missing extra, 111 the system refuses to listen.  A
failure of the application has others: 1 for an exception at import, 3 from uvicorn.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import gc
import importlib.util
import inspect
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any, Callable, NoReturn, Optional, Sequence, TypeVar

from .errors import ProtocolError
from .listener import Listener
from .worker import current

_PROGRAM = "socketprotector-run"
_ASGI, _WSGI = "ASGI", "WSGI"
#: The server for each kind of application, and the extra that installs it.
_SERVERS = {_ASGI: ("uvicorn", "asgi"), _WSGI: ("waitress", "wsgi")}


#: What each server imports when it begins to serve; missing ones do not matter.
_IMPORTED = {
    _ASGI: (
        *("asyncio", "uvicorn", "uvicorn.lifespan.on", "uvicorn.protocols.http.auto"),
        *("uvicorn.protocols.websockets.auto",),
    ),
    _WSGI: (f"{__package__}.waitress",),
}
#: A threshold for gc.set_threshold() that no program reaches.
_NEVER = 2**31 - 1
_T = TypeVar("_T")


class _CannotRun(Exception):
    """One line on why the command fails: wrong use (status 2), or a system call failed (111)."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _CannotRun(f"{message} (see {_PROGRAM} --help)")

    def print_help(self, file: object = None) -> None:
        """Print the help.  argparse's own method ignores a failed write."""
        try:
            print(self.format_help(), end="", flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drop the buffered help
            if not isinstance(error, BrokenPipeError):  # it is no error if `| head` has exited
                raise _CannotRun(f"cannot write to stdout: {error.strerror}", 111) from None


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command; return its exit status."""
    atexit.register(_drop_unwritten_errors)
    try:
        return _run(_parser().parse_args(arguments))
    except (_CannotRun, ProtocolError) as error:
        with suppress(OSError):  # stderr's reader has exited
            print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return getattr(error, "status", 2)


def _drop_unwritten_errors() -> None:
    """Keep the exit status: if Python cannot flush stderr at the end, it exits with 120."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        sys.stderr = None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROGRAM,
        description="Serve an ASGI or WSGI application on the connections of SocketProtector.",
    )
    parser.add_argument("app", metavar="MODULE:APP", help="such as shop.web:app")
    parser.add_argument("--factory", action="store_true", help="APP() returns the application")
    kind = parser.add_mutually_exclusive_group()
    for each in (_ASGI, _WSGI):
        text = f"treat the application as {each}; default: detect the kind"
        kind.add_argument(
            f"--{each.lower()}", dest="kind", action="store_const", const=each, help=text
        )
    parser.add_argument(
        "--bind",
        metavar="ADDRESS",
        action="append",
        help="where to listen without a protector: 4321, localhost:4321, unix:/run/x.sock; "
        "repeatable; ignored under a protector",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=_positive,
        default=4,
        help="number of threads, for WSGI (%(default)s)",
    )
    parser.add_argument(
        "--processes",
        metavar="N",
        type=lambda text: 0 if text == "auto" else _positive(text),
        help="load once, then fork N processes, which share the memory; auto: one for each "
        "processor that the cgroup allows",
    )
    parser.add_argument(
        "--allow-threads",
        action="store_true",
        help="with --processes: fork even if the application has started threads",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _run(given: argparse.Namespace) -> int:
    if not given.bind and not current().is_served:
        raise _CannotRun(
            "no address to listen on: start it by SocketProtector, or pass --bind ADDRESS"
        )
    load = _load if given.processes is None else _load_and_freeze
    app = load(given.app, given.factory)
    kind = given.kind or _kind_of(app, given.app)
    server, extra = _SERVERS[kind]
    if importlib.util.find_spec(server) is None:
        raise _CannotRun(
            f"cannot serve {given.app}: it is {kind} and {server} is not installed; "
            f"pip install 'socketprotector-client[{extra}]'"
        )
    serve = functools.partial(_serve_asgi if kind == _ASGI else _serve_wsgi, app, given)
    try:
        if given.processes is None:
            serve()
        else:
            _fork(serve, given, kind)
    except KeyboardInterrupt:
        pass  # Ctrl-C, without a protector
    return 0


def _fork(serve: Callable[[], None], given: argparse.Namespace, kind: str) -> None:
    """Serve in forked children.  The parent imports what they need, so that they share it."""
    from .processors import processors
    from .server import SocketServer

    for name in _IMPORTED[kind]:
        importlib.import_module(name)
    with _listening(lambda: SocketServer(given.bind)) as server:
        given.bind = None  # the children take from the server's queue
        try:
            server.fork(serve, given.processes or processors(), allow_threads=given.allow_threads)
        except (OSError, RuntimeError, ValueError) as error:
            raise _CannotRun(str(error), status=1) from None


def _load_and_freeze(text: str, factory: bool) -> Any:
    """Load without garbage collections, which would examine the loaded objects again and again.

    One collection at the end is enough, because the loaded objects are kept.  Source: gc.freeze().
    """
    before = gc.get_threshold()
    gc.set_threshold(_NEVER)
    app = _load(text, factory)
    gc.collect()
    gc.freeze()
    if gc.get_threshold()[0] == _NEVER:  # otherwise the application has chosen its own
        gc.set_threshold(*before)
    return app


def _load(text: str, factory: bool) -> Any:
    """Return the application that MODULE:APP names.

    Raises _CannotRun if there is none; exceptions of the module itself pass through.
    """
    module_name, colon, attributes = text.partition(":")
    if not (colon and module_name and attributes):
        raise _CannotRun(f"cannot use {text!r}: pass MODULE:APP, such as shop.web:app")
    # As `python -m` does; the first entry of a console script is the script's own folder.
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{module_name}.".startswith(f"{missing}."):
            raise  # a module that the application itself imports
        raise _CannotRun(
            f"cannot import {module_name}: there is no module {missing} in {os.getcwd()} or on "
            f"Python's path"
        ) from None
    except (TypeError, ValueError) as error:  # ".x", "x..y"
        if module_name.startswith(".") or ".." in module_name:
            raise _CannotRun(f"cannot import {module_name!r}: {error}") from None
        raise
    for name in attributes.split("."):
        if not hasattr(found, name):
            raise _CannotRun(f"cannot find {attributes} in {module_name}: it has no {name}")
        found = getattr(found, name)
    if factory and callable(found):
        if not _takes_nothing(found):
            raise _CannotRun(f"cannot call {text}() without arguments: leave out --factory")
        found, text = found(), f"what {text}() returned"
    if not callable(found):
        raise _CannotRun(f"cannot serve {text}: it is {type(found).__name__}, not an application")
    return found


def _takes_nothing(factory: Callable[..., Any]) -> bool:
    """Return whether a factory can be called without arguments."""
    try:
        # A decorator may pass the arguments itself.
        signature = inspect.signature(factory, follow_wrapped=False)
    except (NameError, TypeError, ValueError):
        return True  # unknown
    try:
        signature.bind()
    except TypeError:
        return False
    return True


def _kind_of(app: Any, text: str) -> str:
    """Return ASGI or WSGI, by the parameters: (scope, receive, send), (environ, start_response)."""
    plain = app
    while isinstance(plain, functools.partial):
        plain = plain.func
    call = plain if inspect.isroutine(plain) or inspect.isclass(plain) else type(plain).__call__
    if inspect.iscoroutinefunction(call):
        return _ASGI
    try:
        parameters = list(inspect.signature(app).parameters.values())
    except (TypeError, ValueError):
        parameters = []  # written in C
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [p for p in parameters if p.kind in named and p.default is p.empty]
    if len(wanted) in (2, 3) and not inspect.isclass(app):
        return _WSGI if len(wanted) == 2 else _ASGI
    hint = "; if it returns the application, pass --factory" if not wanted else ""
    raise _CannotRun(f"cannot tell whether {text} is ASGI or WSGI: pass --asgi or --wsgi{hint}")


def _listening(make: Callable[[], _T]) -> _T:
    try:
        return make()
    except ValueError as error:
        raise _CannotRun(str(error)) from None
    except OSError as error:
        raise _CannotRun(error.strerror or str(error), status=111) from None


def _serve_wsgi(app: Any, given: argparse.Namespace) -> None:
    from .waitress import serve_on

    listener = _listening(lambda: Listener(given.bind, take=None))
    if not current().is_served and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, functools.partial(_drain_or_exit, listener))
    serve_on(listener, app, threads=given.threads)


def _drain_or_exit(listener: Listener, *_: object) -> None:
    """Handle SIGTERM without a protector: exit after the last client; a second SIGTERM ends us."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        listener.stop_accepting()
    except OSError:
        sys.exit(0)  # no free descriptor: end now, even if clients are cut off


def _serve_asgi(app: Any, given: argparse.Namespace) -> None:
    import uvicorn

    # After its shutdown uvicorn raises SIGTERM again, which without a handler would kill us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # loop: uvloop would accept below Python.  interface: known here; uvicorn would guess it.
    config = uvicorn.Config(
        app, loop="asyncio", interface="asgi3", log_level="warning", access_log=False
    )
    listener = _listening(lambda: Listener(given.bind, take=1))

    class Server(uvicorn.Server):
        """A uvicorn server that reads its clients' requests before it obeys SIGTERM.

        Under `--handoff listener`, and in a forked child, SIGTERM may begin the drain.  At SIGTERM
        uvicorn disconnects clients whose request is unread.  So at a first SIGTERM the listener
        only stops accepting, and sends SIGTERM again once all requests are read.
        """

        _has_stopped = not (current().passed or current().seat)

        def handle_exit(self, sig: int, frame: Optional[FrameType]) -> None:
            if sig == signal.SIGTERM and not self._has_stopped:
                self._has_stopped = True
                try:
                    listener.stop_accepting()
                    return
                except OSError:
                    pass  # no free descriptor: end now, even if unread clients are cut off
            super().handle_exit(sig, frame)

        async def startup(self, *args: Any, **options: Any) -> None:
            await super().startup(*args, **options)
            spread = current().spread
            if spread is not None:
                import asyncio

                from .uvicorn_turns import Turns

                spread.end = Turns(self, asyncio.get_running_loop()).end

    Server(config).run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(main())
