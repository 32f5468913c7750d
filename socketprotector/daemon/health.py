"""--health: asks the generation that serves, every now and then, and says what it answers.

Nothing follows from that but what is said: status, metrics, /readyz of the exporter, and an event
when it changes.  What generations share, such as a database, fails for all of them at once, on
every host: to start any of them again would make it worse.

A question is a connection of ours, beside all that is counted.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from ..model import question
from ..model.history import HEALTHY, History
from ..model.question import Question
from ..model.settings import Settings
from ..system.check_command import shown
from .delivery import Delivery
from .generation import OpenGeneration
from .probe import Probe
from .runtime import Runtime
from .verdicts import UNHEALTHY, Serving, Verdict

_TIMER = "health"


class Health:
    """What is known of the generation that new clients come to."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        settings: Callable[[], Settings],
        delivery: Delivery,
        remember: Callable[[Callable[[History], History]], None],
    ) -> None:
        """settings: those that hold.  remember: changes the history by the function given."""
        self._loop, self._log = runtime.loop, runtime.log
        self._persist, self._remember = runtime.persist, remember
        self._settings, self._delivery = settings, delivery
        self._probe = Probe(
            runtime.loop,
            lambda generation, name: delivery.reach(generation, name, as_client=True),
            as_client=True,
        )
        self._generation: OpenGeneration | None = None
        self._held_to: tuple[object, ...] = ()
        self._asked = Question("")
        self.known = Serving(time.time())

    @property
    def asks(self) -> str:
        """What is asked, as `status` says it; "": nothing."""
        return shown(self._settings().health)

    @property
    def tcp_connection(self) -> socket.socket | None:
        """That of the question which is under way, if it has one by TCP."""
        return self._probe.connection

    def set_serving(self, generation: OpenGeneration | None) -> None:
        """New clients come to this generation from now on; None: to none."""
        if generation is not self._generation:
            self._generation = generation
            self._begin()

    def apply_settings(self) -> None:
        """A reload may have changed them."""
        if self._held_to != self._options():
            self._begin()

    def suspend(self) -> None:
        """Ask no more in this program; the next one asks again."""
        self._loop.cancel(_TIMER)
        self._probe.end()

    def resume(self) -> None:
        """There was no next one."""
        text = self._settings().health
        if self._generation is not None and text:
            self._asked = question.read_health(text)
            self._loop.call_after(_TIMER, 0.0, self._ask)

    # -- inside ------------------------------------------------------------------

    def _options(self) -> tuple[object, ...]:
        its = self._settings()
        return its.health, its.health_every_s, its.health_failures, its.health_timeout_s

    def _begin(self) -> None:
        options = self._options()
        if self._generation is None or options != self._held_to:
            self.suspend()
        self._held_to = options
        self._probe.close()
        self.known = Serving(time.time())
        self.resume()

    def _ask(self) -> None:
        its, generation = self._settings(), self._generation
        assert generation is not None
        self._loop.call_after(_TIMER, its.health_every_s, self._ask)
        if not self._delivery.is_silent and not self._probe.asks:
            self._probe.ask(generation, self._asked, its.health_timeout_s, self._heard)

    def _heard(self, verdict: Verdict) -> None:
        before, most = self.known, self._settings().health_failures
        self.known = known = before.after(verdict, most, time.time())
        if known.state == before.state or self._generation is None:
            return
        number, reason = self._generation.record.number, known.last or None
        self._remember(
            lambda history: history.health_changed(number, known.state, known.last, known.since_at)
        )
        self._persist()  # no decision follows, which would write it
        if known.state == HEALTHY:
            self._log.write("info", "healthy", generation=number)
        else:
            self._log.write(
                "warning",
                "unhealthy" if known.state == UNHEALTHY else "health-unknown",
                generation=number,
                reason=reason,
            )
