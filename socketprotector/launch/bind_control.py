"""Binds the control socket: at --control, or at the default path (docs/control.md).

A protector works without a control socket, so a failure here only causes a notice.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ..model.errors import SystemRefused
from ..model.settings import Settings
from ..system import control_path
from .bind import Bound
from .bind_unix import admit_group, bind_unix
from .listen_spec import Listen

_BACKLOG = 64


def default_path(name: str) -> str:
    """Return the default path of an instance's control socket.

    If the instance has its own folder, the socket is in this folder.
    """
    own = os.path.join(_folder(), control_path.key_of(name))
    if os.path.isdir(own):
        return os.path.join(own, control_path.IN_OWN_FOLDER)
    return f"{own}{control_path.SUFFIX}"


def _folder() -> str:
    return control_path.folders(os.environ, os.geteuid())[0]


def bind_control(settings: Settings, notice: Callable[[str], None]) -> Bound | None:
    """Bind the control socket; root, the protector's user and the settings' groups may use it.

    Returns None if no socket is wanted, or if the bind fails.  On failure, passes the reason to
    `notice`.
    """
    if settings.control is None:
        return None
    path = settings.control.address.removeprefix("unix:")
    names: tuple[str, ...] = (settings.name,)
    if path == default_path(settings.name):
        # Another protector with this name may be running.
        names += control_path.apart(settings.name, settings.listeners[0].address)
    why = ""
    for called in names:
        at = default_path(called) if len(names) > 1 else path
        try:
            if os.path.dirname(at) == _folder():
                # Other users may list this folder, because each socket in it has its own mode.
                os.makedirs(_folder(), 0o755, exist_ok=True)
            bound = _bind(settings, at)
        except OSError as error:
            why = f"{error.filename}: {error.strerror}"
            break
        except SystemRefused as error:
            why = str(error)
            if not _is_taken(error):
                break
        else:
            if called != settings.name:
                notice(
                    f"another protector is already named {settings.name}. Use --name {called} for "
                    f"this one, --name {settings.name}:PORT for the other (`socketprotectorctl "
                    "list`), or restart one with a different --name"
                )
            return bound
    notice(f"no control socket: {why}; reload by HUP, or restart with another --control PATH")
    return None


def _bind(settings: Settings, path: str) -> Bound:
    options = {"mode": "0600"}
    owner = settings.identity.uid if settings.identity is not None else -1
    groups = [each for each in (settings.control_group, settings.status_group) if each is not None]
    if groups:
        options.update(mode="0660", group=str(groups[0]))
    others = set(groups[1:]) - set(groups[:1])
    if owner >= 0 and not others:
        options["user"] = str(owner)
    listen = Listen(path, path=path, options=options)
    bound = Bound(*bind_unix(listen, path, _BACKLOG))
    try:
        for other in others:
            admit_group(bound.socket, path, other, owner)
    except OSError as error:
        bound.discard()
        raise SystemRefused(
            f"--control-group and --status-group: {path} cannot be for both: {error.strerror}; "
            "leave one out, or use a file system with ACLs"
        ) from error
    return bound


def _is_taken(error: SystemRefused) -> bool:
    """Return True if the bind failed because another process listens at the path."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
