"""Bind the control socket: where nobody said, where tools look for it (docs/control.md).

A protector without one works as well, so what fails here is a notice and no more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from . import control_path
from .address import Listen
from .bind import Bound
from .bind_unix import bind_unix
from .errors import SystemRefused
from .settings import Settings

_BACKLOG = 64


def default_path(name: str | None, addresses: Sequence[str], command: str) -> str:
    """Return where the control socket goes: by --name, else the first port, else the command."""
    ports = (address.rpartition(":")[2] for address in addresses if address.startswith("tcp:"))
    key = control_path.key_of(name or next(ports, "") or os.path.basename(command))
    folder = control_path.folders(os.environ, os.geteuid())[0]
    own = os.path.join(folder, key)
    if os.path.isdir(own):
        return os.path.join(own, control_path.IN_OWN_FOLDER)
    return os.path.join(folder, f"{key}{control_path.SUFFIX}")


def bind_control(settings: Settings, notice: Callable[[str], None]) -> Bound | None:
    """Bind it, for root, the protector's user and the settings' group.

    Returns None where none is wanted, or where it fails; then `notice` is told why.
    """
    if settings.control is None:
        return None
    path = settings.control.address.removeprefix("unix:")
    options = {"mode": "0600"}
    if settings.identity is not None:
        options["user"] = str(settings.identity.uid)
    if settings.control_group is not None:
        options.update(mode="0660", group=str(settings.control_group))
    try:
        folder = control_path.folders(os.environ, os.geteuid())[0]
        if os.path.dirname(path) == folder:
            # Others may look into it: the sockets there have modes of their own.
            os.makedirs(folder, 0o755, exist_ok=True)
        listen = Listen(path, path=path, options=options)
        return Bound(*bind_unix(listen, path, _BACKLOG, dry=False))
    except OSError as error:
        notice(f"no control socket: {error.filename}: {error.strerror}; see --control")
    except SystemRefused as error:
        notice(f"no control socket: {error}; see --control")
    return None
