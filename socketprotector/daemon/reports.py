"""Carries out the action `Report` (core/actions.py).

A report goes to the log, systemd (sd_notify(3)) and the launching process.

The class Reports also keeps the history of reloads, health and crashes, which outlives an upgrade
or a kill.  After STOPPING=1, a report of a reload sends neither READY=1 nor RELOADING=1: they would
contradict STOPPING=1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from ..core.actions import Report, ReportKind
from ..core.fleet import Fleet, LameDuck
from ..model.history import History
from ..model.lazy_dataclass import replace
from ..model.policy import Policy
from ..model.records import RunRecord
from ..model.text import added, headline, in_units
from ..system.listener import Listener
from ..system.log import Log
from ..system.sd_notify import Systemd
from .start_report import StartReport

_LEVELS = {
    ReportKind.RELOAD_FAILED: "error",
    ReportKind.DRY_RUN_FAILED: "warning",
    ReportKind.START_FAILED: "error",
    ReportKind.RETRYING: "warning",
    ReportKind.MANY_DRAINING: "warning",
    ReportKind.REFUSED: "warning",
    ReportKind.EXITED: "warning",
    ReportKind.BROKEN: "error",
}
_RESULTS = {ReportKind.RELOADED: "reloaded", ReportKind.RELOAD_FAILED: "failed"}
_DRY_RUN_RESULTS = {ReportKind.DRY_RUN_PASSED: "passed", ReportKind.DRY_RUN_FAILED: "failed"}
_OF_RELOADS = (
    ReportKind.RELOADING,
    ReportKind.RELOADED,
    ReportKind.RECOVERED,
    ReportKind.RELOAD_FAILED,
)
NO_INTERFACE = (
    "its interface was removed, so no client can connect; restart SocketProtector when the "
    "interface is back"
)
#: How long our exit may take after the last worker's exit.  EXTEND_TIMEOUT_USEC includes this time.
_TO_END_S = 5.0


def with_notes(report: Report, *notes: str) -> Report:
    """Return a report whose reason also has these notes, before any last words."""
    return replace(report, reason=added(report.reason, "; ".join(notes)))


class Reports:
    """The reports to the log, the history, systemd and the launching process."""

    def __init__(
        self,
        log: Log,
        systemd: Systemd,
        start_report: StartReport,
        *,
        policy: Callable[[], Policy],
    ) -> None:
        """policy: returns the policy in force, which limits a stop's duration."""
        self._log = log
        self._systemd = systemd
        self._start_report = start_report
        self._policy = policy
        # True after STOPPING=1, and after a failed start.
        self._is_stopping = False
        self.run = RunRecord(started_at=time.time())
        #: The generation of the worker that last exited unexpectedly, or could not start; and why.
        self.last_exit = (0, "")

    def adopt(self, record: RunRecord, log_level: str) -> None:
        """After an upgrade or a kill, continue the earlier program's run record.

        log_level: the log level of that program; "": unknown.
        """
        started_at = record.started_at or self.run.started_at
        self.run = replace(record, started_at=started_at, restarts=record.restarts + 1)
        if log_level:
            self._log.set_level(log_level)

    def repeat_messages(self, fleet: Fleet) -> None:
        """After an upgrade or a kill, send systemd the messages that match the fleet's state.

        The earlier program may have ended before it sent these messages.
        """
        if fleet.stop_awaits_rescue:
            self._send_stopping()
        elif fleet.lame_duck is LameDuck.STOPPING:
            self._send_lame_duck()
        elif fleet.served and not fleet.stopping:
            self._send_ready("resumed after a restart")
            if (fleet.incoming or fleet.has_unopened) and not fleet.dry_run:
                self._systemd.reloading()
        elif fleet.stopping:
            self._send_stopping()

    def remember(self, change: Callable[[History], History]) -> None:
        """Change the history; the next write of the state includes the change."""
        self.run = replace(self.run, history=change(self.run.history))

    def reload_began(self, generation: int, listeners: Iterable[Listener]) -> None:
        """Record in the history that a reload has opened this generation.

        Also report each listener whose interface was removed: it gets no clients.
        """
        for each in listeners:
            if each.lacks_interface:
                self.listener_lost(each.settings.address, NO_INTERFACE)
        now = time.time()
        self.remember(lambda history: history.reload_began(generation, now))

    def write(self, report: Report, release: str = "") -> None:
        """Send a report to the log, the history, systemd and the launching process.

        release: the release of the report's generation; "": unknown, or --releases is not set.
        """
        first_line = headline(report.reason)
        _, _, last_words = report.reason.partition("\n")
        self._log.write(
            _LEVELS.get(report.news, "info"),
            report.news.value,
            generation=report.generation or None,
            release=release or None,
            reason=first_line or None,
            last_words=last_words or None,
        )
        self._remember_reload(report)
        if report.news is ReportKind.EXITED:
            self.last_exit = (report.generation, first_line)
        serving = f"generation {report.generation} is serving"
        match report.news:
            case ReportKind.READY:
                self._send_ready(serving)
            case _ if self._is_stopping and report.news in _OF_RELOADS:
                pass  # messages to systemd would contradict STOPPING=1
            case ReportKind.RELOADING:
                self._systemd.reloading()
            case ReportKind.RELOADED | ReportKind.RECOVERED:
                self._systemd.send(READY="1", STATUS=serving)
            case ReportKind.RELOAD_FAILED:
                # systemd has no message for a failed reload: send READY=1, with the reason.
                self._systemd.send(READY="1", STATUS=f"reload failed: {first_line}")
            case ReportKind.START_FAILED:
                self._systemd.send(STATUS=f"start failed: {first_line}")
                self._start_report.failure = report.reason
                self._is_stopping = True
            case ReportKind.LAME_DUCK:
                self._send_lame_duck()
            case ReportKind.LAME_DUCK_ON:
                self._systemd.send(STATUS="lame duck: still serving, but not ready for new clients")
            case ReportKind.LAME_DUCK_OFF:
                self._systemd.send(STATUS="ready again: lame duck off")
            case ReportKind.STOPPING:
                self._send_stopping(first_line)

    def listener_lost(self, address: str, reason: str) -> None:
        """Report that a listener gets no more clients."""
        hint = "the socket was broken, or its file or interface was removed; "
        hint += "restart SocketProtector to restore the listener"
        self._log.write("error", "listener-lost", listen=address, error=reason, hint=hint)
        status = f"{address} no longer accepts connections; restart SocketProtector"
        self._systemd.send(STATUS=status)

    def _remember_reload(self, report: Report) -> None:
        now = time.time()
        number, reason = report.generation, report.reason
        if report.news is ReportKind.DRY_RUN:
            self.remember(lambda history: history.dry_run_began(number, now))
        if report.news is ReportKind.RETRYING:
            self.remember(lambda history: history.reload_begins_again(number))
        if (result := _RESULTS.get(report.news)) is not None:
            self.remember(lambda history: history.reload_ended(number, result, reason, now))
        if (verdict := _DRY_RUN_RESULTS.get(report.news)) is not None:
            self.remember(lambda history: history.dry_run_ended(number, verdict, reason, now))

    def _send_ready(self, status: str) -> None:
        self._systemd.send(READY="1", MAINPID=str(self._systemd.pid), STATUS=status)
        self._start_report.started()

    def _send_lame_duck(self) -> None:
        seconds = self._policy().lame_duck_s
        accepts = f"lame duck, accepts clients for up to {in_units(seconds)}"
        self._send_stopping(accepts, before_s=seconds)

    def _send_stopping(self, reason: str = "", before_s: float = 0.0) -> None:
        """Send STOPPING=1; before_s: the time until the stop begins."""
        self._is_stopping = True
        policy = self._policy()
        status = f"stopping: {reason}" if reason else "stopping"
        seconds = before_s + policy.stop_timeout_s + policy.kill_timeout_s + _TO_END_S
        usec = str(int(seconds * 1_000_000))
        # EXTEND_TIMEOUT_USEC: systemd would kill us after the unit's TimeoutStopSec, which may be
        # shorter than --stop-timeout.
        self._systemd.send(STOPPING="1", STATUS=status, EXTEND_TIMEOUT_USEC=usec)
