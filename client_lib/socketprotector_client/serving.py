"""Serve connections one after the other, or with a pool of threads.

The same program runs under the protector and without it, and ends in the same
way: when nothing more will come, what is being served is finished.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

from .connection import Connection
from .errors import Drained
from .intake import Intake
from .log import Logger
from .signals import TermWatch
from .worker import Worker, current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, List, Optional, Tuple

    from .address import ListenAddress

    #: Called with the connection and the client's address as accept() gives it.
    Handler = Callable[[Connection, Any], object]

_log = Logger(__name__)

#: Threads mostly wait for their client, so more than there are processors.
DEFAULT_THREADS = 16


def connections(
    address: Optional[ListenAddress] = None, *, limit: Optional[int] = None
) -> Iterator[Tuple[Connection, Any]]:
    """Iterate over (socket, client's address); end when the worker drains.

    Each socket is a plain blocking one that the caller owns and closes.  While
    `limit` of them are open (default: RLIMIT_NOFILE less 64), further
    connections stay in the queue that all workers share, or in the backlog.

    Without a protector it binds `address` and listens; under one the address is
    ignored.  Says READY=1.  The drain begins when the protector asks for it, or
    at SIGTERM if this is the main thread and SIGTERM has no handler.

    Raises ValueError without protector and address, OSError if the address
    cannot be bound, ProtocolError if the protector speaks another version.
    """
    # Not a generator itself: these errors belong to the call, not to the first step.
    worker = current()
    intake = worker.open_intake(address, limit)
    worker.ready()
    return _iterate(worker, intake)


def _iterate(worker: Worker, intake: Intake) -> Iterator[Tuple[Connection, Any]]:
    with _open_until_drained(worker, intake):
        while True:
            try:
                connection = intake.get()
            except Drained:
                break
            if connection is not None:
                yield connection, connection.peer
                # Or the last one would count as open while the next is waited for.
                del connection


@contextmanager
def _open_until_drained(worker: Worker, intake: Intake) -> Iterator[None]:
    watch = TermWatch(intake)
    try:
        yield
    finally:
        watch.stop()
        intake.close()
    worker.drain.finish()


def serve(
    handler: Handler,
    address: Optional[ListenAddress] = None,
    *,
    threads: int = DEFAULT_THREADS,
    limit: Optional[int] = None,
) -> None:
    """Call handler(socket, client's address) for each connection; return when drained.

    Up to `threads` handlers run at once, one of them in the calling thread; a
    connection is only taken when a thread is free for it.  The socket is closed
    after the handler.  An exception in a handler is logged, the others go on.
    On drain, handlers finish before this returns.

    `address`, `limit`, SIGTERM, READY=1 and errors are those of `connections`.
    """
    if threads < 1:
        raise ValueError(f"cannot serve with threads={threads}: at least 1 is needed")
    worker = current()
    serve_from(worker, worker.open_intake(address, limit), handler, threads)


def serve_from(worker: Worker, intake: Intake, handler: Handler, threads: int) -> None:
    """As `serve`, from an intake; takes ownership of it."""
    errors: List[BaseException] = []
    # None takes before all have begun.  For the ninth thread of a process glibc opens
    # /sys/devices/system/cpu/online for a moment (arena_get2() in malloc/arena.c), and where no
    # other descriptor is free it would get the one that was given up for a connection.
    all_begun = threading.Event()

    def work_elsewhere() -> None:
        try:
            all_begun.wait()
            _serve_all(intake, handler)
        except BaseException as error:  # raised again below: it ends the service
            errors.append(error)
            intake.interrupt()

    # Daemons, so that Ctrl-C ends a program whose clients never hang up.
    others = [
        threading.Thread(target=work_elsewhere, name=f"serve-{number}", daemon=True)
        for number in range(1, threads)
    ]
    with _open_until_drained(worker, intake):
        if others:
            intake.share()
        for thread in others:
            thread.start()  # returns when it has begun
        worker.ready()
        all_begun.set()
        try:
            _serve_all(intake, handler)
        except Exception as error:
            errors.insert(0, error)
            intake.interrupt()
        except BaseException:  # Ctrl-C does not wait for the other threads
            intake.interrupt()
            raise
        for thread in others:
            thread.join()
        if errors:
            raise errors[0]


def _serve_all(intake: Intake, handler: Handler) -> None:
    while True:
        try:
            connection = intake.get()
        except Drained:
            return
        if connection is None:
            continue
        try:
            handler(connection, connection.peer)
        except Exception:
            intake.board.failed()
            _log.exception("handler failed for a client of %s", connection.listener)
        finally:
            connection.close()
