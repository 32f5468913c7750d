"""Binds the control socket: at --control, else at the default path (docs/control.md).

A protector works without one, so a failure here is only a notice.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ..model.errors import SystemRefused
from ..model.settings import Settings
from ..system import control_path
from .bind import Bound
from .bind_unix import bind_unix
from .listen_spec import Listen

_BACKLOG = 64


def default_path(name: str) -> str:
    """Return where the control socket of a service goes: in its own folder, if it has one."""
    folder = _folder()
    key = control_path.key_of(name)
    own = os.path.join(folder, key)
    if os.path.isdir(own):
        return os.path.join(own, control_path.IN_OWN_FOLDER)
    return os.path.join(folder, f"{key}{control_path.SUFFIX}")


def _folder() -> str:
    return control_path.folders(os.environ, os.geteuid())[0]


def bind_control(settings: Settings, notice: Callable[[str], None]) -> Bound | None:
    """Bind it, for root, the protector's user and the settings' group.

    Returns None where none is wanted, or where it fails; then `notice` is told why.
    """
    if settings.control is None:
        return None
    path = settings.control.address.removeprefix("unix:")
    try:
        if os.path.dirname(path) == _folder():
            # Others may look into it: the sockets there have modes of their own.
            os.makedirs(_folder(), 0o755, exist_ok=True)
        bound, called = _bind_apart(settings, path)
    except OSError as error:
        notice(f"no control socket: {error.filename}: {error.strerror}; see --control")
    except SystemRefused as error:
        notice(f"no control socket: {error}; see --control")
    else:
        if called != settings.name:
            notice(
                f"another protector is called {settings.name}: for socketprotectorctl this one is "
                f"--name {called}; --name gives it a name of its own"
            )
        return bound
    return None


def _bind_apart(settings: Settings, path: str) -> tuple[Bound, str]:
    """Bind it there, or under another name if one of that name runs; return the name.

    Raises OSError, SystemRefused.
    """
    others: tuple[str, ...] = ()
    if path == default_path(settings.name):
        others = control_path.apart(settings.name, settings.listeners[0].address)
    for called, other in zip((settings.name, *others), (*others, ""), strict=True):
        try:
            return _bind(settings, default_path(called) if others else path), called
        except SystemRefused as error:
            if not other or not _is_taken(error):
                raise
    raise AssertionError("the last one returns or raises")


def _bind(settings: Settings, path: str) -> Bound:
    """Bind it there.  Raises OSError, SystemRefused."""
    options = {"mode": "0600"}
    if settings.identity is not None:
        options["user"] = str(settings.identity.uid)
    if settings.control_group is not None:
        options.update(mode="0660", group=str(settings.control_group))
    listen = Listen(path, path=path, options=options)
    return Bound(*bind_unix(listen, path, _BACKLOG, dry=False))


def _is_taken(error: SystemRefused) -> bool:
    """Whether another protector listens there."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
