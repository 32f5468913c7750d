"""The resident process, as its delivery knows it."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping

from ...system.listener import Listener
from ..generation import OpenGeneration
from ..runtime import Runtime


class Host(ABC):
    """The part of the resident process that a delivery may use and report to.

    The host is Effects (daemon/effects.py).  Effects passes the settings that a delivery needs as
    arguments of Delivery's methods.
    """

    runtime: Runtime
    generations: Mapping[int, OpenGeneration]  # open generations, by number

    @abstractmethod
    def listener_lost(self, listener: Listener, reason: str) -> None:
        """Note that a listener gets no more clients."""

    @abstractmethod
    def listener_bound(self, listener: Listener) -> None:
        """Note that a listener has a new socket file."""

    @abstractmethod
    def report_untaken(
        self, seconds: float, waiting: int, ever: bool, listen: str | None = None
    ) -> None:
        """Report, once for each route, that workers have accepted no client for this time.

        waiting: how many clients wait.  ever: a client was accepted before.  listen: the addresses
        where clients wait; None: they wait in the queue.
        """

    @property
    @abstractmethod
    def own_connection(self) -> socket.socket | None:
        """Our own TCP connection to the serving generation, if there is one."""
