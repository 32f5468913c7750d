"""The interface through which a delivery uses the resident process.

A delivery (delivery/__init__.py) brings clients to the workers.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping

from ...system.listener import Listener
from ..generation import OpenGeneration
from ..runtime import Runtime


class Host(ABC):
    """The part of the resident process that a delivery uses, and reports to.

    Effects (daemon/effects.py) implements this class.
    """

    runtime: Runtime
    generations: Mapping[int, OpenGeneration]  # open generations, by number

    @abstractmethod
    def listener_lost(self, listener: Listener, reason: str) -> None:
        """Record that a listener gets no more clients."""

    @abstractmethod
    def listener_bound(self, listener: Listener) -> None:
        """Record that a listener's sockets changed; a UNIX path may have a new socket file."""

    @abstractmethod
    def report_untaken(
        self, seconds: float, waiting: int, ever: bool, listen: str | None = None
    ) -> None:
        """Report that the route's workers have accepted no client for this number of seconds.

        The route is the generation that gets the new clients.
        waiting: how many clients wait.  listen: the addresses where these clients wait; None: they
        wait in the queue.  ever: False if the workers have certainly never accepted a client at one
        or more of these addresses, or (without `listen`) from the queue.
        """

    @property
    @abstractmethod
    def own_connection(self) -> socket.socket | None:
        """The open TCP connection of the last health probe; None: there is none.

        A delivery does not count this connection.
        """
