"""Reuses listeners that a graceful stop left with systemd, so that a restart refuses no client.

During a restart, systemd keeps the sockets in its descriptor store, and new clients wait in the
kernel.  The workers of the previous protector have finished, and its settings do not matter.  So
this is an ordinary start for which some addresses are bound already.
(A killed protector also leaves its settings and workers.  Then the start adopts them:
inherited.is_ours().)

This runs in the launching process.

Source: sd_notify(3), FDSTORE=1 and FDSTOREREMOVE=1; service_add_fd_store() in systemd, which does
not store a socket a second time under another name.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from ..system.sd_notify import Outbox, Store
from .activation import Passed
from .bind import Bound, addresses_of, place, reuse
from .listen_spec import Listen

#: How long to wait until systemd has read the messages.
_MANAGER_S = 5.0


def take(
    listens: Sequence[Listen],
    passed: Collection[int],
    inherited: Sequence[Bound],
    backlog: int,
    notice: Callable[[str], None],
    *,
    same_name: bool = False,
) -> dict[str, Bound]:
    """Set up the inherited sockets that are still wanted; return them by place().

    The other inherited sockets are closed.  Raises Refusal.
    passed: the indexes of arguments that have a passed socket.
    same_name: whether a path must be written as it was bound.  Where workers accept, the names of
    the files beside it begin with that name (socket_file.py), which may lead elsewhere later.
    """
    key = str if same_name else place
    wanted: dict[str, list[Listen]] = {}
    for index, listen in enumerate(listens):
        if inherited and index not in passed:
            for address in addresses_of(listen, lambda text: None):
                wanted.setdefault(key(address), []).append(listen)
    taken: dict[str, Bound] = {}
    for each in inherited:
        address = place(each.settings.address)
        matching = wanted.get(key(each.settings.address), [])
        try:
            if len(matching) == 1 and address not in taken:
                taken[address] = reuse(each, matching[0], matching[0].backlog(backlog))
                continue
            several = len(matching) > 1
            why = "several listeners have this address, each with a device" if several else ""
        except OSError as error:
            why = error.strerror or str(error)
        if why:
            notice(
                f"{matching[0].text}: bound again, so clients that came meanwhile were refused: "
                f"the socket that systemd kept does not fit the settings ({why})"
            )
        _discard(each)
    return taken


def _discard(bound: Bound) -> None:
    """Shut a socket down for every process that has a copy.

    Its file stays: the service's user could have bound any path.  The next bind finds a stale file.
    """
    with suppress(OSError):
        bound.socket.shutdown(socket.SHUT_RDWR)
    bound.socket.close()


def store(passed: Passed, bound: Mapping[str, Bound]) -> None:
    """Update systemd's descriptor store: our sockets in use get new names, others are removed.

    bound: the sockets by their new names.
    """
    if not passed.stored:
        return
    names = {each.socket.fileno(): each.settings.name for each in passed.inherited}
    kept = {name: each.socket.fileno() for name, each in bound.items() if each.inherited}
    same = {name for name, fd in kept.items() if names[fd] == name}
    outbox = Outbox(lambda again: None, address=os.environ.get("NOTIFY_SOCKET", ""))
    fd_store = Store(outbox, passed.stored)
    for name in fd_store.kept - same:  # first, because a new name may be another socket's old name
        fd_store.forget(name)
    fd_store.sync(kept)
    outbox.finish(_MANAGER_S)
