"""Serves connections one after the other, or in a pool of threads.

The same program runs with and without a protector.  In both cases it ends in the same way: when no
more connections will come, it finishes the open connections.
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

    #: Called with the connection and the client's address, as accept() returns it.
    Handler = Callable[[Connection, Any], object]

_log = Logger(__name__)

#: More threads than processors, because a thread mostly waits for its client.
DEFAULT_THREADS = 16


def connections(
    address: Optional[ListenAddress] = None, *, limit: Optional[int] = None
) -> Iterator[Tuple[Connection, Any]]:
    """Yield (socket, client's address) for each connection; end when the worker drains.

    Each socket is a `Connection`: a blocking socket that the caller owns and closes.
    While `limit` sockets are open (default: RLIMIT_NOFILE less 64), further
    connections stay in the queue that all workers share, or in the backlog.

    Without a protector it binds `address` and listens; under a protector the address is
    ignored.  Sends READY=1.  The drain begins at the protector's request, or
    at SIGTERM if this is the main thread and SIGTERM has no handler.

    Raises ValueError if `limit` is below 1, or if there is neither a protector nor an
    address.  Raises OSError if the address cannot be bound, and ProtocolError if the
    protector speaks another version.
    """
    # This function is not a generator, so that the call itself raises these errors.
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
                # Otherwise a connection that the caller has dropped would count as open during the
                # next wait.
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
    processes: Optional[int] = None,
    allow_threads: bool = False,
) -> None:
    """Call handler(socket, client's address) for each connection; return when drained.

    Up to `threads` handlers run at once, one of them in the calling thread; a
    connection is only taken when a thread is free for it.  The socket is closed
    after the handler.  An exception in a handler is logged, and serving continues.
    On drain, running handlers finish before this returns.

    processes: how many children to fork, which then serve and share the loaded memory; 0: one child
    for each processor.  Each child has its own threads and limit.  See SocketServer.fork.

    `address`, `limit`, SIGTERM, READY=1 and errors are those of `connections`.
    Also raises ValueError if `threads` is below 1.
    """
    if threads < 1:
        raise ValueError(f"cannot serve with threads={threads}: at least 1 is needed")
    worker = current()
    if processes is not None:
        from .processors import processors
        from .server import SocketServer

        def work() -> None:
            serve(handler, threads=threads, limit=limit)

        if processes < 0:
            raise ValueError(f"cannot serve with processes={processes}: it is negative")
        with SocketServer(address) as server:
            server.fork(work, processes or processors(), allow_threads=allow_threads)
        return
    serve_from(worker, worker.open_intake(address, limit), handler, threads)


def serve_from(worker: Worker, intake: Intake, handler: Handler, threads: int) -> None:
    """Serve as `serve` does, from an intake; takes ownership of it."""
    # More threads than the limit could serve no more clients at once.  The kernel might wake such a
    # thread for a client that this worker must leave to another worker, which then would not wake.
    threads = min(threads, intake.limit)
    errors: List[BaseException] = []
    # No thread takes a connection before all have begun.  For the ninth thread of a process glibc
    # briefly opens /sys/devices/system/cpu/online (arena_get2() in malloc/arena.c).  That open
    # could take the last free descriptor, which was released for a connection.
    all_begun = threading.Event()

    def work_elsewhere() -> None:
        try:
            all_begun.wait()
            _serve_all(intake, handler)
        except BaseException as error:  # raised again below: it ends the service
            errors.append(error)
            intake.interrupt()

    # Use daemon threads, so that Ctrl-C ends a program whose clients never disconnect.
    others = [
        threading.Thread(target=work_elsewhere, name=f"serve-{number}", daemon=True)
        for number in range(1, threads)
    ]
    with _open_until_drained(worker, intake):
        if others:
            intake.share()
        for thread in others:
            thread.start()  # returns when the thread has begun
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
            intake.board.count_error()
            _log.exception("handler failed for a client of %s", connection.listener)
        finally:
            try:
                connection.close()
            except OSError as error:  # the handler has closed the descriptor itself
                _log.error("cannot close a client of %s: %s", connection.listener, error.strerror)
