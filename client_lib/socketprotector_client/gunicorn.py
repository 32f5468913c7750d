"""gunicorn on the connections of a protector: a configuration for its `-c`.

    gunicorn -c python:socketprotector_client.gunicorn -b ADDRESS MODULE:APP

Or, in a configuration of your own, import the three hooks.  For gunicorn's sync and gthread
workers; the others accept in ways of their own.  Without a protector nothing is changed.

gunicorn's master is the protector's worker, and its own workers share the queue.  Two things
are not as gunicorn has them: READY=1 is said by the first worker that has loaded the
application, not by the master before that (or an application that cannot be loaded would pass for
ready); and the worker that sees the end asks the master to stop, which would else replace it.

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
    """What gunicorn's workers accept from."""

    def sleep_for(self, worker: Any) -> None:
        """Have one of all idle workers woken for a connection: see shared_epoll.py."""
        intake = self._opened()
        self._ended_by = os.getppid()
        poller = getattr(worker, "poller", None)
        if poller is not None:
            BesideEpoll.put(poller, "_selector", intake, self.fileno())
        elif intake.source.wakes_one:
            intake.sleep_beside(worker.PIPE[0])
            worker.wait = partial(_wait, worker, intake)

    def get_backlog(self) -> Optional[int]:
        """Return None: the queue is the protector's, which reports it."""
        return None


def on_starting(server: Any) -> None:
    """Give the master a Listener, so that it binds nothing."""
    if current().channel is None:
        return
    _check_worker_class(server)
    # Both kinds of worker accept once for each wake-up.
    server.LISTENERS = [_Listener(take=None)]
    # A UNIX socket's path is the protector's: not to be removed at the end.
    server.systemd = True
    # The master would say READY=1 now.
    server.socketprotector_notify = os.environ.pop(wire.ENV_NOTIFY, None)


def when_ready(server: Any) -> None:
    """Undo what was only for the start of the master."""
    address = getattr(server, "socketprotector_notify", None)
    if address is not None:
        os.environ[wire.ENV_NOTIFY] = address


def post_worker_init(worker: Any) -> None:
    """Say READY=1 in a worker that has loaded the application."""
    if current().channel is not None:
        for each in worker.sockets:
            if isinstance(each, _Listener):
                each.sleep_for(worker)
        current().ready()


def _wait(worker: Any, intake: Intake, timeout: float) -> List[Any]:
    """Do what gunicorn's sync worker does before it accepts again, but by select()."""
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
