"""Listeners that a graceful stop has left with systemd: `systemctl restart` refuses no client.

systemd keeps what is in its descriptor store while a restart waits, and clients that connect
meanwhile wait in the kernel.  Of the protector before us nothing else is there: its workers have
finished, and its settings do not matter.  So this is no adoption, but a start that finds some of
its addresses bound already.  (A killed protector has its settings there as well, and a start that
finds these does not come here: inherited.is_ours().)

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

#: How long systemd may take to hear of it.
_MANAGER_S = 5.0


def take(
    listens: Sequence[Listen],
    passed: Collection[int],
    left: Sequence[Bound],
    backlog: int,
    notice: Callable[[str], None],
) -> dict[str, Bound]:
    """Return, by address, what is wanted still, as a new one would be; close the rest.

    passed: indexes of those arguments that other sockets stand for.  Raises Refusal.
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
                f"{mine[0].text}: bound anew, so clients that came meanwhile were refused: "
                f"the socket from before does not fit what is asked for ({why})"
            )
        _let_go(each)
    return taken


def _let_go(left: Bound) -> None:
    """Shut it down, for every process that has a copy; and remove the file that is its own."""
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

    bound: by their names from now on.
    """
    if not passed.stored:
        return
    names = {each.socket.fileno(): each.settings.name for each in passed.left}
    kept = {name: each.socket.fileno() for name, each in bound.items() if each.left}
    same = {name for name, fd in kept.items() if names[fd] == name}
    outbox = Outbox(lambda again: None, address=os.environ.get("NOTIFY_SOCKET", ""))
    there = Store(outbox, passed.stored)
    for name in there.kept - same:  # all of them before: the next name may be that of another
        there.forget(name)
    there.sync(kept)
    outbox.finish(_MANAGER_S)
