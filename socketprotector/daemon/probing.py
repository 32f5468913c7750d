"""Probes generations in three phases.

ready_probe.py probes a starting generation, settle_check.py a settling generation, and health.py
the serving generation.  Each of these modules is loaded at its first use (system/late_modules.py).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping

from ..model.history import History
from ..model.settings import Settings
from . import health, ready_probe, settle_check
from .check_probe import CheckProbes
from .delivery import Delivery
from .generation import OpenGeneration
from .runtime import Runtime
from .worker_pool import WorkerPool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .health import Health
    from .ready_probe import ReadyProbe
    from .settle_check import SettleCheck


class Probing:
    """ReadyProbe, SettleCheck and Health, each made at its first use."""

    def __init__(
        self,
        runtime: Runtime,
        delivery: Delivery,
        addresses: CheckProbes,
        *,
        settings: Callable[[], Settings],
        remember: Callable[[Callable[[History], History]], None],
        pool: WorkerPool,
    ) -> None:
        """addresses: the probe addresses for check commands.

        settings, remember: see Health.
        """
        self._runtime, self._delivery, self._addresses = runtime, delivery, addresses
        self._settings, self._remember, self._pool = settings, remember, pool
        #: Returns the counts that `status` shows, by generation, for --settle-check commands.
        self.counts: Callable[[], Mapping[int, Mapping[str, Any]]] = dict
        self.ready_probe: ReadyProbe | None = None
        self.settle_check: SettleCheck | None = None
        self.health: Health | None = None

    def probe_starting(self, generation: OpenGeneration) -> None:
        """Probe a starting generation: see ReadyProbe.begin()."""
        if self.ready_probe is None:
            self.ready_probe = ready_probe.ReadyProbe(
                self._runtime,
                reach=self._delivery.reach,
                answered=self._pool.answered,
                inconclusive=self._pool.allow_timer,
            )
        self.ready_probe.begin(generation)

    def stop_probing(self) -> None:
        """Stop the probes of the starting generation."""
        if self.ready_probe is not None:
            self.ready_probe.stop()

    @property
    def why_not_ready(self) -> str:
        """Return why the starting generation is not ready, according to the last probe."""
        return self.ready_probe.why_not_ready if self.ready_probe is not None else ""

    @property
    def was_accepted(self) -> bool:
        """Return whether a worker of the starting generation accepted the last HTTP probe."""
        return self.ready_probe is not None and self.ready_probe.was_accepted

    def check_settling(self, generation: OpenGeneration) -> None:
        """Probe a settling generation until it fails, or until stop_checking()."""
        if self.settle_check is None:
            self.settle_check = settle_check.SettleCheck(
                self._runtime, self._delivery.reach, self._addresses, lambda: self.counts()
            )
        self.settle_check.begin(generation)

    def stop_checking(self) -> None:
        """Stop the probes of the settling generation."""
        if self.settle_check is not None:
            self.settle_check.stop()

    def note_settle_over(self, number: int) -> bool:
        """Record that --settle is over; return whether the generation still needs a good answer."""
        return self.settle_check is not None and self.settle_check.note_settle_over(number)

    @property
    def settle_check_due(self) -> bool:
        """Return whether --settle is over, but the generation still waits for a good answer."""
        return self.settle_check is not None and self.settle_check.is_due

    def set_serving(self, generation: OpenGeneration | None) -> None:
        """Check the health of this generation, which gets new clients; None: stop the checks."""
        if self.health is None:
            if generation is None or not self._settings().health:
                return
            self.health = health.Health(
                self._runtime,
                settings=self._settings,
                delivery=self._delivery,
                remember=self._remember,
                has_ready=self._pool.has_ready,
            )
        self.health.set_serving(generation)

    def apply_settings(self, route: OpenGeneration | None) -> None:
        """Apply the options of a reload; route: the generation that gets new clients, or None."""
        if self.health is not None:
            self.health.apply_settings()
        else:
            self.set_serving(route)

    @property
    def tcp_connection(self) -> socket.socket | None:
        """The open TCP connection of the last health probe; None: there is none."""
        return self.health.tcp_connection if self.health is not None else None

    def suspend(self) -> None:
        """Stop all probes; resume(), or the upgraded SocketProtector, starts them again."""
        for each in self._used():
            each.suspend()

    def resume(self) -> None:
        """Restart the probes after an upgrade's exec has failed."""
        for each in self._used():
            each.resume()

    def _used(self) -> Iterable[ReadyProbe | SettleCheck | Health]:
        parts = (self.ready_probe, self.settle_check, self.health)
        return [each for each in parts if each is not None]
