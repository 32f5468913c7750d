"""What a generation is started from: command, environment, limits, resolved as things are now."""

from __future__ import annotations

import os

from socketprotector_client import wire

from . import envfile
from .process import resolve
from .records import Program
from .settings import Settings

#: What belongs to the protector alone and must not reach a worker.
_PRIVATE = ("NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "SOCKETPROTECTOR_", "FDSTORE")


def program_of(settings: Settings) -> Program:
    """Resolve the command as it is now.  Raises OSError or ValueError."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_PRIVATE)
    }
    if settings.env_file is not None:
        environment.update(envfile.read(settings.env_file))
    environment.update(settings.environment)
    directory = os.path.realpath(settings.directory, strict=True)
    path, argv = resolve(settings.command, directory, environment.get("PATH", os.defpath))
    environment["PWD"] = directory
    return Program(
        path=path,
        argv=argv,
        directory=directory,
        environment=tuple(environment.items()),
        umask=settings.umask,
        limits=tuple({"nofile": settings.nofile_soft, **dict(settings.limits)}.items()),
        nice=settings.nice,
        identity=settings.worker_identity,
        batch=settings.batch,
        listeners=wire.pack_listeners(
            [wire.REMOVED_LISTENER if e.removed else e.address for e in settings.listeners]
        ),
        ready_after_s=settings.ready_after_s,
        watchdog_s=settings.watchdog_s,
    )
