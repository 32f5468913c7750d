"""Serve connections one after the other, or with a pool of threads.

The same program runs under the protector and without it, and ends in the same
way: when nothing more will come, what is being served is finished.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Callable, Iterator, List, Optional, Tuple

from .address import ListenAddress
from .connection import Connection
from .errors import Drained
from .intake import Intake
from .signals import watch_term
from .worker import Worker, current

_log = logging.getLogger(__name__)

#: Called with the connection and the client's address as accept() gives it.
Handler = Callable[[Connection, Any], object]

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
    return _iterate(intake)


def _iterate(intake: Intake) -> Iterator[Tuple[Connection, Any]]:
    watch = watch_term(intake)
    try:
        while True:
            try:
                connection = intake.get()
            except Drained:
                break
            if connection is not None:
                yield connection, connection.peer
                # Or the last one would count as open while the next is waited for.
                del connection
    finally:
        watch.stop()
        intake.close()
    current().drain.finish()


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
    worker.ready()
    pool = _Pool(intake, handler)
    watch = watch_term(intake)
    try:
        pool.run(threads)
    finally:
        watch.stop()
        intake.close()
    worker.drain.finish()


class _Pool:
    """Threads that each take a connection, serve it, and take the next."""

    def __init__(self, intake: Intake, handler: Handler) -> None:
        self._intake = intake
        self._handler = handler
        self._errors: List[BaseException] = []

    def run(self, threads: int) -> None:
        if threads > 1:
            self._intake.share()
        # Daemons, so that Ctrl-C ends a program whose clients never hang up.
        others = [
            threading.Thread(target=self._work_elsewhere, name=f"serve-{number}", daemon=True)
            for number in range(1, threads)
        ]
        for thread in others:
            thread.start()
        try:
            self._work()
        except Exception as error:
            self._errors.insert(0, error)
            self._intake.interrupt()
        except BaseException:  # Ctrl-C waits for nobody
            self._intake.interrupt()
            raise
        for thread in others:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _work_elsewhere(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised again by run(): it ends the service
            self._errors.append(error)
            self._intake.interrupt()

    def _work(self) -> None:
        while True:
            try:
                connection = self._intake.get()
            except Drained:
                return
            if connection is not None:
                self._serve_one(connection)

    def _serve_one(self, connection: Connection) -> None:
        try:
            self._handler(connection, connection.peer)
        except Exception:
            self._intake.failed()
            _log.exception("handler failed for a client of %s", connection.listener)
        finally:
            connection.close()
