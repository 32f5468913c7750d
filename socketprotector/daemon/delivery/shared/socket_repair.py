"""Gives a starting generation its own sockets, and repairs the sockets that workers have broken.

We make a broken socket listen again, or replace it by a new socket.  If we cannot prepare a socket
for a starting generation, SocketSteering.enter() decides whether the generation fails.

A listening socket is an open file description that all workers share, so any worker can shut it
down for all.  If we replace a socket that workers have, another generation must start, because
running workers cannot get the new socket.
"""

from __future__ import annotations

import errno

from ....core.events import SocketLost, Stranded
from ....system import socket_copy
from ....system.listener import Listener
from .listener_hold import ListenerHold
from .probes import RETRY_ERRNOS
from .shared_listeners import SharedListeners, Steering
from .socket_option_restore import SocketOptionRestore
from .socket_watch import SocketWatch
from .turns import Turns

CUT_OFF = "its socket file was removed, so no client can connect; restart SocketProtector"
RESTART = "restart SocketProtector: until then a release that fails may keep clients out"


class SocketRepair:
    """The repair of sockets, for a starting generation and after a worker has broken a socket."""

    def __init__(
        self,
        listeners: SharedListeners,
        turns: Turns,
        hold: ListenerHold,
        watch: SocketWatch,
        steering: Steering,
    ) -> None:
        self._listeners, self._turns, self._hold = listeners, turns, hold
        self._watch, self._steering = watch, steering
        runtime = listeners.host.runtime
        self._loop, self._log, self._post = runtime.loop, runtime.log, runtime.post
        self.options = SocketOptionRestore(listeners, steering)
        self.ended = False  # True: our listeners are being closed, so repair no socket

    def repair(self, listener: Listener, socket_number: int) -> None:
        """Make a socket that was shut down listen again, or replace it by a new socket."""
        if self.ended or listener.lost:
            return
        self._loop.unwatch(listener.socket_for(socket_number).fileno())
        if listener.listen_again(socket_number):
            # Steer before we log: until we steer, new clients go to the other socket.
            self._steering.steer()
            self._log.write("warning", "listens-again", listen=listener.settings.address)
        else:
            self.replace(listener, socket_number)
        self._watch.watch_later()

    def repair_all(self) -> None:
        """Repair sockets that no longer listen, and replace sockets that are out of reach.

        Epoll reports only sockets that were shut down.  This method also finds sockets on which a
        worker has called connect(), and sockets whose network device or file is missing.
        """
        for each in self._listeners.living:
            for number in range(len(each.sockets)):
                if each not in self._listeners.living:
                    break  # a repair has lost this listener, or cancelled the reload that added it
                if not each.is_alive(number):
                    self.repair(each, number)
                elif self._is_out_of_reach(each, number):
                    self.replace(each, number)

    def _is_out_of_reach(self, listener: Listener, number: int) -> bool:
        """Return whether clients or probes need a socket but cannot reach it.

        Clients need the socket that gets the new clients, now or after a hold.  Clients cannot
        connect if the file of this socket (at a UNIX path) is gone.

        Probes need the starting generation's socket.  Probes cannot connect if the file or the
        network device of this socket is gone.  Exception: return False if all the listener's
        sockets have lost their device, because then no new socket can be bound.
        """
        turns = self._turns
        if number == turns.number_for(listener):
            return listener.is_out_of_reach(number)
        if turns.accepting.get(turns.starting or 0) != number or listener.lacks_interface:
            return False  # neither clients nor probes need the socket, or no socket can be bound
        device_is_gone = socket_copy.device_is_gone(listener.socket_for(number))
        return device_is_gone or listener.is_out_of_reach(number)

    def make_ready(self, listener: Listener, socket_number: int) -> None:
        """Prepare the listener's socket for a starting generation.  Raises OSError."""
        if not listener.is_alive(socket_number) or not listener.is_sound(socket_number):
            self.repair(listener, socket_number)
        self._watch.unwatch(listener)
        if listener.is_reserved_for_clients and not self._hold.on:
            listener.adopt_reserved(socket_number)
            self._listeners.note_bound(listener)
        # If running workers lack the listener's only socket (for example because we replaced it),
        # clients may already wait at it.  So the starting generation must get this socket.  If we
        # made a second socket instead, perhaps no worker could accept the waiting clients.
        workers_lack_socket = any(index == listener.index for _, index in self._turns.unserved)
        if (listener.has_sibling or not workers_lack_socket) and listener.renew(socket_number):
            self._listeners.note_bound(listener)
        if listener.is_cut_off and self.must_be_reachable(listener):
            raise FileNotFoundError(errno.ENOENT, CUT_OFF, listener.local_address[0])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Messages about listeners that no client reaches, or that have no spare socket."""
        if self.ended:  # for a stop, we remove the socket files ourselves
            return ()
        cut_off = [
            f"{each.settings.address}: {CUT_OFF}"
            for each in self._listeners.living
            if not each.has_sibling and each.is_cut_off
        ]
        spent = [
            f"{each.settings.address}: a release broke a socket, and no spare is left; {RESTART}"
            for each in self._listeners.living
            if each.has_no_spare
        ]
        astray = [
            f"{each.settings.address}: no client can connect: {fault}"
            for each in self._listeners.living
            if each.has_sibling and (fault := each.path_fault)
        ]
        return *cut_off, *astray, *spent

    def must_be_reachable(self, listener: Listener) -> bool:
        """Return whether a new release must fail if clients cannot reach it at this listener.

        True if the listener has two sockets.  Also true if all listeners are cut off (their socket
        files were removed): then no client could reach the release.
        """
        return listener.has_sibling or all(each.is_cut_off for each in self._listeners.living)

    def undo_earlier_changes(self, listener: Listener, socket_number: int, generation: int) -> None:
        """Undo earlier generations' changes to the socket that a new generation gets."""
        if not listener.has_sibling:
            listener.let_in()
            if listener.is_cut_off:
                self._listeners.host.listener_lost(listener, CUT_OFF)
        elif socket_number not in self._turns.accepting.values():
            try:
                socket_copy.reset(listener.socket_for(socket_number))
            except OSError:  # a worker of an earlier generation has locked the socket's filter
                self.replace(listener, socket_number)

        def is_alone() -> bool:
            return not self._turns.accepting_at(listener, socket_number)

        self.options.begin(generation, listener, socket_number, is_alone)

    def replace(self, listener: Listener, socket_number: int) -> None:
        """Replace a broken socket by a new socket.

        If no socket can be bound, keep the old socket for a later repair in two cases.  First,
        another try may succeed (RETRY_ERRNOS).  Second, the listener is a UNIX path with two
        sockets, and this socket still listens: only its files are missing.  In all other cases use
        the listener's other or reserved socket instead.  Without such a socket, the listener is
        lost.
        """
        self._loop.unwatch(listener.socket_for(socket_number).fileno())
        address = listener.settings.address
        is_single = not listener.has_sibling
        try:
            listener.bind_anew(socket_number)
        except OSError as error:
            # Keep a sound socket if only its files are missing: their directory may come back.
            cut_off = listener.is_alive(socket_number) and listener.is_cut_off
            awaits_files = cut_off and not is_single and listener.file_rights is not None
            if error.errno in RETRY_ERRNOS or awaits_files:
                self._watch.watch_later()
                return
            if is_single and not listener.is_reserved_for_clients:
                self._listeners.lose(listener, error.strerror or str(error))
                return
            if is_single:  # clients may wait at the reserved socket, so use it from now on
                listener.adopt_reserved(0)
                listener.drop_socket(1)
            else:
                listener.drop_socket(socket_number)
                why = error.strerror
                fields = {"listen": address, "error": why, "hint": RESTART}
                self._log.write("warning", "one-socket-left", **fields)
        lacking = self._turns.note_replaced(listener, None if is_single else socket_number)
        self._steering.steer()
        if is_single or listener.has_sibling:
            self._log.write("warning", "socket-replaced", listen=address)
        self._listeners.note_bound(listener)
        self._steering.adopt_held()
        starting = self._turns.starting
        if starting in lacking:
            # Post SocketLost first: the starting generation must fail before the next generation
            # starts.
            self._post(SocketLost(starting))
            lacking.remove(starting)
        if lacking:
            self._post(Stranded())
