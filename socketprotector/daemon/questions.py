"""What generations are asked, from their start to their end; loaded where it is switched on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping

from ..model.history import History
from ..model.settings import Settings
from . import asking, health, settle_check
from .check_probe import CheckProbes
from .delivery import Delivery
from .generation import OpenGeneration
from .runtime import Runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .asking import Asking
    from .health import Health
    from .settle_check import SettleCheck


class Questions:
    """The three times at which a generation is asked: each is made at its first use."""

    def __init__(
        self,
        runtime: Runtime,
        delivery: Delivery,
        addresses: CheckProbes,
        *,
        settings: Callable[[], Settings],
        remember: Callable[[Callable[[History], History]], None],
        answered: Callable[[int, str], None],
        not_asked: Callable[[int], None],
    ) -> None:
        """settings, remember: see Health.  answered, not_asked: see Asking."""
        self._runtime, self._delivery, self._addresses = runtime, delivery, addresses
        self._settings, self._remember = settings, remember
        self._answered, self._not_asked = answered, not_asked
        #: What is counted of the generations, by number.
        self.counts: Callable[[], Mapping[int, Mapping[str, Any]]] = dict
        self.asking: Asking | None = None
        self.settle_check: SettleCheck | None = None
        self.health: Health | None = None

    def ask(self, generation: OpenGeneration) -> None:
        """Ask one that starts, until it has answered."""
        if self.asking is None:
            self.asking = asking.Asking(
                self._runtime,
                reach=self._delivery.reach,
                answered=self._answered,
                not_asked=self._not_asked,
            )
        self.asking.ask(generation)

    def stop_asking(self) -> None:
        """Ask it no more."""
        if self.asking is not None:
            self.asking.stop()

    @property
    def last(self) -> str:
        """Why one that starts has not answered as it should, as far as is known."""
        return self.asking.last if self.asking is not None else ""

    def check(self, generation: OpenGeneration) -> None:
        """Ask one that settles, until it is to stop."""
        if self.settle_check is None:
            self.settle_check = settle_check.SettleCheck(
                self._runtime, self._delivery.reach, self._addresses, lambda: self.counts()
            )
        self.settle_check.begin(generation)

    def stop_checking(self) -> None:
        """Ask it no more."""
        if self.settle_check is not None:
            self.settle_check.stop()

    def awaits(self, number: int) -> bool:
        """Whether a generation settles on, though its time is over, until its next good answer."""
        return self.settle_check is not None and self.settle_check.awaits(number)

    @property
    def is_due(self) -> bool:
        """Whether --settle is over, and the next good answer is waited for."""
        return self.settle_check is not None and self.settle_check.is_due

    def set_serving(self, generation: OpenGeneration | None) -> None:
        """New clients come to this generation from now on; None: to none."""
        if self.health is None:
            if generation is None or not self._settings().health:
                return
            self.health = health.Health(
                self._runtime,
                settings=self._settings,
                delivery=self._delivery,
                remember=self._remember,
            )
        self.health.set_serving(generation)

    def apply_settings(self, route: OpenGeneration | None) -> None:
        """A reload may have changed them; route: where new clients come to."""
        if self.health is not None:
            self.health.apply_settings()
        else:
            self.set_serving(route)

    @property
    def tcp_connection(self) -> socket.socket | None:
        """That of a question to the generation that serves, if it has one by TCP."""
        return self.health.tcp_connection if self.health is not None else None

    def suspend(self) -> None:
        """Ask nothing more in this program; the next one asks again."""
        for each in self._used():
            each.suspend()

    def resume(self) -> None:
        """There was no next one."""
        for each in self._used():
            each.resume()

    def _used(self) -> Iterable[Asking | SettleCheck | Health]:
        parts = (self.asking, self.settle_check, self.health)
        return [each for each in parts if each is not None]
