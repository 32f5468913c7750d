"""--health: probes the serving generation periodically, and reports the result.

`status`, metrics and the exporter's /readyz show the result.  If a probe changes the result
(healthy, unhealthy or unknown), the log reports the change.  A bad result restarts no worker: if a
shared dependency such as a database fails, the check fails on all hosts at once.  Restarts on all
hosts would prolong that failure.

`active` and `queue` of `status` may include a probe.  Probes do not count as accepted clients.
Exception: under --handoff listener, the client library cannot recognize probes, so it counts them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from ..model import probe_spec
from ..model.history import HEALTHY, History
from ..model.probe_spec import ProbeSpec
from ..model.settings import Settings
from ..system.check_command import shown
from .delivery import Delivery
from .generation import OpenGeneration
from .probe import Probe
from .runtime import Runtime
from .verdicts import BAD, UNHEALTHY, UNMADE, UNTAKEN, Serving, Verdict

_TIMER = "health"


class Health:
    """The health check of the serving generation."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        settings: Callable[[], Settings],
        delivery: Delivery,
        remember: Callable[[Callable[[History], History]], None],
        has_ready: Callable[[int], bool],
    ) -> None:
        """settings: returns the settings in force.

        remember(change): replaces the history with change(history).
        has_ready: takes a generation's number, returns whether one of its workers is ready.
        """
        self._loop, self._log = runtime.loop, runtime.log
        self._persist, self._remember = runtime.persist, remember
        self._settings, self._delivery, self._has_ready = settings, delivery, has_ready
        self._probe = Probe(
            runtime.loop,
            lambda generation, name: delivery.reach(generation, name, as_client=True),
            as_client=True,
        )
        self._generation: OpenGeneration | None = None
        self._applied: tuple[object, ...] = ()  # the options in use, to find changes
        self._spec = ProbeSpec("")
        #: The results since the generation or the options changed.
        self.results = Serving(time.time())

    @property
    def shown_check(self) -> str:
        """The health check, as `status` shows it; "": there is none."""
        return shown(self._settings().health)

    @property
    def tcp_connection(self) -> socket.socket | None:
        """The open TCP connection of the last probe; None: there is none."""
        return self._probe.connection

    def set_serving(self, generation: OpenGeneration | None) -> None:
        """From now on, probe this generation, which gets new clients; None: stop the probes."""
        if generation is not self._generation:
            self._generation = generation
            self._begin()

    def apply_settings(self) -> None:
        """Restart the check if a reload has changed its options."""
        if self._applied != self._options():
            self._begin()

    def suspend(self) -> None:
        """Stop the probes; resume(), or the upgraded SocketProtector, starts them again."""
        self._loop.cancel(_TIMER)
        self._probe.end()

    def resume(self) -> None:
        """Start the probes: for the first time, after suspend(), or for another generation."""
        text = self._settings().health
        if self._generation is not None and text:
            self._spec = probe_spec.read_health(text)
            self._loop.call_after(_TIMER, 0.0, self._send_probe)

    # -- inside ------------------------------------------------------------------

    def _options(self) -> tuple[object, ...]:
        found = self._settings()
        return found.health, found.health_every_s, found.health_failures, found.health_timeout_s

    def _begin(self) -> None:
        options = self._options()
        if self._generation is None or options != self._applied:
            self.suspend()
        self._applied = options
        self._probe.close()
        self.results = Serving(time.time())
        self.resume()

    def _send_probe(self) -> None:
        settings, generation = self._settings(), self._generation
        assert generation is not None
        self._loop.call_after(_TIMER, settings.health_every_s, self._send_probe)
        # is_silent: during a hold under --handoff listener, TCP probes would get no answer.
        if not self._delivery.is_silent and not self._probe.is_pending:
            self._probe.send(generation, self._spec, settings.health_timeout_s, self._on_verdict)

    def _on_verdict(self, verdict: Verdict) -> None:
        if self._generation is None:
            return
        number = self._generation.record.number
        if verdict.kind in (UNMADE, UNTAKEN) and not self._has_ready(number):
            verdict = Verdict(BAD, "no worker is ready")
        before, most = self.results, self._settings().health_failures
        self.results = results = before.after(verdict, most, time.time())
        if results.state == before.state:
            return
        reason = results.last or None
        self._remember(
            lambda history: history.health_changed(
                number, results.state, results.last, results.since_at
            )
        )
        self._persist()  # no event follows, so nothing else would write the state
        if results.state == HEALTHY:
            self._log.write("info", "healthy", generation=number)
        else:
            self._log.write(
                "warning",
                "unhealthy" if results.state == UNHEALTHY else "health-unknown",
                generation=number,
                reason=reason,
            )
