"""Reuses listeners that a graceful stop left with systemd: `systemctl restart` refuses no client.

During a restart systemd keeps the sockets in its descriptor store, and new clients wait in the
kernel.  The previous protector has left nothing else: its workers have finished, and its settings
do not matter.  So this is no adoption, but a start that finds some of its addresses bound already.
(A killed protector also leaves its settings; then the start adopts: inherited.is_ours().)

Runs in the launching process.

Source: sd_notify(3), FDSTORE=1 and FDSTOREREMOVE=1; service_add_fd_store() in systemd, which does
not take the same socket again under another name.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from ..system.dir_lock import locked
from ..system.sd_notify import Outbox, Store
from .activation import Passed
from .bind import Bound, addresses_of, reuse
from .bind_unix import is_file_of
from .listen_spec import Listen

#: How long systemd may take to read the messages.
_MANAGER_S = 5.0


def take(
    listens: Sequence[Listen],
    passed: Collection[int],
    left: Sequence[Bound],
    backlog: int,
    notice: Callable[[str], None],
) -> dict[str, Bound]:
    """Return the sockets still wanted, by address, set up like new ones; close the others.

    passed: the indexes of arguments that have a passed socket.  Raises Refusal.
    """
    wanted: dict[str, list[Listen]] = {}
    for index, listen in enumerate(listens):
        if left and index not in passed:
            for address in addresses_of(listen, lambda text: None):
                wanted.setdefault(address, []).append(listen)
    taken: dict[str, Bound] = {}
    for each in left:
        address = each.settings.address
        mine = wanted.get(address, [])
        try:
            if len(mine) == 1 and address not in taken:
                taken[address] = reuse(each, mine[0], mine[0].backlog(backlog))
                continue
            why = "several have this address, each with a device" if len(mine) > 1 else ""
        except OSError as error:
            why = error.strerror or str(error)
        if why:
            notice(
                f"{mine[0].text}: bound again, so clients that came meanwhile were refused: "
                f"the socket that systemd kept does not fit the settings ({why})"
            )
        _let_go(each)
    return taken


def _let_go(left: Bound) -> None:
    """Shut a socket down, for every process that has a copy, and remove its own file."""
    path = left.settings.address.removeprefix("unix:")
    if path.startswith("/"):
        # OSError: it is gone, or may not be removed; the next bind finds it stale.
        with suppress(OSError), locked(path):
            if is_file_of(left.socket, os.lstat(path)):
                os.unlink(path)
    with suppress(OSError):
        left.socket.shutdown(socket.SHUT_RDWR)
    left.socket.close()


def store(passed: Passed, bound: Mapping[str, Bound]) -> None:
    """Store the used sockets with systemd under their new names, and remove our others.

    bound: the sockets by their new names.
    """
    if not passed.stored:
        return
    names = {each.socket.fileno(): each.settings.name for each in passed.left}
    kept = {name: each.socket.fileno() for name, each in bound.items() if each.left}
    same = {name for name, fd in kept.items() if names[fd] == name}
    outbox = Outbox(lambda again: None, address=os.environ.get("NOTIFY_SOCKET", ""))
    there = Store(outbox, passed.stored)
    for name in there.kept - same:  # first of all: a new name may be the old name of another
        there.forget(name)
    there.sync(kept)
    outbox.finish(_MANAGER_S)
