"""gunicorn on the connections of a protector: a configuration for gunicorn's option `-c`.

    gunicorn -c python:socketprotector_client.gunicorn -b ADDRESS MODULE:APP

Or import the three hooks into your own configuration.  For gunicorn's sync and gthread
workers; other kinds accept without Python's accept().  Without a protector nothing is changed.

gunicorn's master is the protector's worker, and gunicorn's workers share the queue.  Two things
differ from plain gunicorn.  READY=1 comes from the first worker that has loaded the application,
not from the master: an application that cannot be loaded must not look ready.  And the worker that
notices the drain makes the master stop; otherwise the master would replace that worker.

Source: docs.gunicorn.org, "Server Hooks" and "Signal Handling".
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any, List, Optional

from . import wire
from .intake import Intake
from .listener import Listener
from .shared_epoll import BesideEpoll
from .worker import current

__all__ = ["on_starting", "post_worker_init", "when_ready"]


class _Listener(Listener):
    """The listening socket of gunicorn's workers."""

    def sleep_for(self, worker: Any) -> None:
        """Make the kernel wake one idle worker for a connection, not all: see shared_epoll.py."""
        intake = self._opened()
        self._ended_by = os.getppid()
        poller = getattr(worker, "poller", None)
        if poller is not None:
            BesideEpoll.put(poller, "_selector", intake, self.fileno())
        elif intake.source.wakes_one:
            intake.sleep_beside(worker.PIPE[0])
            worker.wait = partial(_wait, worker, intake)

    def get_backlog(self) -> Optional[int]:
        """Return None: the protector owns the queue and reports its length."""
        return None


def on_starting(server: Any) -> None:
    """Give the master a Listener, so that it binds no socket."""
    if current().channel is None:
        return
    _check_worker_class(server)
    # No spread: the first worker that drains makes the master stop, and the master then stops all
    # workers, also those with connections.
    current().spread = None
    # take=None: both kinds of worker accept once for each wake-up.
    server.LISTENERS = [_Listener(take=None)]
    # The protector owns a UNIX socket's path: gunicorn must not remove it at the end.
    server.systemd = True
    # Hides the variable, so that the master does not send READY=1 now.
    server.socketprotector_notify = os.environ.pop(wire.ENV_NOTIFY, None)


def when_ready(server: Any) -> None:
    """Restore NOTIFY_SOCKET, which on_starting() hides from the master."""
    address = getattr(server, "socketprotector_notify", None)
    if address is not None:
        os.environ[wire.ENV_NOTIFY] = address


def post_worker_init(worker: Any) -> None:
    """Send READY=1 from a worker that has loaded the application."""
    if current().channel is not None:
        for each in worker.sockets:
            if isinstance(each, _Listener):
                each.sleep_for(worker)
        current().ready()


def _wait(worker: Any, intake: Intake, timeout: float) -> List[Any]:
    """Wait for a connection or a signal; replaces select() in gunicorn's sync worker."""
    worker.notify()
    ours, signalled = intake.sleep(timeout)
    if signalled:
        os.read(worker.PIPE[0], 1)
    return list(worker.sockets) if ours else []


def _check_worker_class(server: Any) -> None:
    from gunicorn.workers.gthread import ThreadWorker
    from gunicorn.workers.sync import SyncWorker

    if server.worker_class not in (SyncWorker, ThreadWorker):
        name = server.cfg.worker_class_str
        server.log.error(
            f"cannot use gunicorn's {name} worker with socketprotector_client.gunicorn: only sync "
            f"and gthread accept from a Listener; leave this configuration out and start the "
            f"protector with --handoff listener"
        )
        sys.exit(2)
