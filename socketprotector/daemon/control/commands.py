"""Carries out the commands of the control socket.

Most commands either read values or post an event (core/events.py).

A command that begins a long operation is answered at once.  Clients that have sent `events` get the
operation's result as a log event (docs/control.md).  Exceptions: `diff` and an upgrade check are
answered only when their result is known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from ... import __version__
from ...core.events import (
    Deadline,
    DryRunRequested,
    HoldReleased,
    HoldRequested,
    KillRequested,
    LameDuckRequested,
    PromoteRequested,
    ReloadRequested,
    RenewRequested,
    ReplaceRequested,
    RollbackRequested,
    ScaleRequested,
    StopRequested,
    TimerKind,
)
from ...core.fleet import Fleet, Generation, Phase, State
from ...core.reload import cannot_call_off
from ...core.rollout import FULL, cannot_promote, is_full, no_canary_under
from ...model import control_requests
from ...model.control_requests import Request, RequestError
from ...model.errors import what_failed
from ...model.history import RECENT
from ...model.lazy_dataclass import as_dict, mutable
from ...model.records import WorkerRecord
from ...system.state_file import StateError
from .. import forked_children
from ..config_reader import ConfigAnswer
from ..effects import Effects
from ..runtime import Runtime
from ..supervisor import Supervisor
from . import releases, rollout, status
from .server import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ENDING = (Phase.DRAINING, Phase.ABANDONED)


@mutable
class CommandHandler:
    """Carries out requests to a supervisor, and answers them."""

    supervisor: Supervisor
    runtime: Runtime

    @property
    def _effects(self) -> Effects:
        return self.supervisor.effects

    def handle(self, client: Client, request: Request) -> None:
        """Carry out a request, and answer it.

        Each command except `events` and `diff` has a method `do_NAME`, which returns the answer.
        Raises RequestError.
        """
        definition = control_requests.COMMANDS[request.command]
        if request.command == "events":
            client.follows = True
            client.send_line(control_requests.answer(request.id, {}))
            return
        try:
            fleet = self.supervisor.fleet
            is_too_late = fleet.exiting and not definition.reads and request.command != "stop"
            if is_too_late or (fleet.stop_requested and not definition.while_stopping):
                raise RequestError("refused", "a stop is in progress")
            if request.command == "diff":
                self._begin_diff(client, request)
                return
            if request.command == "upgrade" and request.arguments.get("check"):
                self._begin_upgrade_check(client, request)
                return
            command = getattr(self, "do_" + request.command.replace("-", "_"))
            result = command(**request.arguments)
        except RequestError as wrong:
            wrong.id = request.id
            raise
        except Exception as error:
            if not definition.reads:
                # The command may be half done, so end this process.  With a guard or systemd's fd
                # store, the protector is started again, and resumes from the saved state.
                raise
            self.runtime.log.write(
                "error", "command-failed", command=request.command, error=repr(error)
            )
            raise RequestError(
                "failed",
                "internal error; details are in the log (event=command-failed)",
                request.id,
            ) from error
        client.send_line(control_requests.answer(request.id, result))

    # -- commands that read ------------------------------------------------------

    def do_status(self) -> Mapping[str, Any]:
        effects, fleet = self._effects, self.supervisor.fleet
        settings, delivery = effects.live_settings.settings, effects.delivery
        route = effects.generations.get(fleet.route.number) if fleet.route else None
        history = effects.reports.run.history
        generations = status.of_generations(fleet, effects)
        connections = rollout.leaving_connections(fleet, effects)
        upgrade = self.supervisor.upgrade_waits_for()
        # Save the counts that we are about to show: if the protector is killed and started again,
        # its `status` must not show smaller counts.
        self.runtime.persist()
        return {
            "version": __version__,
            "now": time.time(),
            "phase": status.phase_of(fleet),
            "held_s": self._left_s(TimerKind.HOLD),
            "lame_duck": fleet.lame_duck.value,
            "lame_duck_s": self._left_s(TimerKind.LAME_DUCK),
            "workers_wanted": fleet.workers_wanted,
            "route": fleet.route.number if fleet.route else None,
            "reload_wanted": fleet.reload_wanted,
            "name": settings.name,
            "pid": os.getpid(),
            "main_pid": os.getppid() if effects.pool.guarded else os.getpid(),
            "started_at": effects.reports.run.started_at,
            "restarts": effects.reports.run.restarts,
            "guarded": effects.pool.guarded,
            "control": settings.control.address.removeprefix("unix:") if settings.control else None,
            "handoff": settings.handoff,
            "ready": status.of_ready(settings),
            "health": status.of_health(effects.probing.health),
            "command": [os.path.basename(settings.executed[0])],
            "log_level": self.runtime.log.level,
            "forwarded": delivery.forwarded,
            "lost": delivery.lost,
            "queue_limit": delivery.queue_limit(route) if route else None,
            "listeners": [status.of_listener(each, delivery) for each in delivery.listeners],
            "generations": generations,
            **status.of_waits_for(fleet, effects, generations, connections, upgrade),
            **rollout.of_rollout(fleet, effects, connections),
            **releases.of_status(effects, fleet),
            "dry_run": as_dict(history.dry_run) if history.dry_run is not None else None,
            "reloads": status.plain(history.reloads[-RECENT:]),
            "crashes": history.crashed,
            "warnings": (
                *status.of_warnings(settings, delivery.listeners),
                *status.of_guard(settings, guarded=effects.pool.guarded),
                *status.of_log(self.runtime.log, settings.log_file),
                *effects.pool.warnings,
                *delivery.warnings,
                *releases.warnings(effects),
            ),
        }

    def do_releases(self) -> Mapping[str, Any]:
        return {"releases": releases.listed(self._effects)}

    def do_history(self) -> Mapping[str, Any]:
        return {"history": self._effects.reports.run.history.entries()}

    def _left_s(self, timer: TimerKind) -> float | None:
        """Return the seconds until a timer of the fleet runs out; None: the timer is not set."""
        due = self.runtime.loop.due(Deadline(timer))
        return max(0.0, due - time.monotonic()) if due is not None else None

    def do_connections(self, generation: int | None = None) -> Mapping[str, Any]:
        generations = self._effects.generations
        if generation is not None and generation not in generations:
            raise _no_generation(generation)
        return {
            "workers": status.of_connections(generations, self._effects.pool.records(), generation),
            "addresses_by_generation": status.of_addresses(generations, generation),
        }

    def do_crashes(self) -> Mapping[str, Any]:
        output = self._effects.output
        return {
            "crashes": status.plain(self._effects.reports.run.history.crashes),
            "last_words_hint": None if output.keeps_words else output.where_to_look(),
        }

    def _begin_diff(self, client: Client, request: Request) -> None:
        """Begin a `diff`; the answer follows when a reader process (config_reader.py) has ended.

        Raises RequestError.
        """
        if not self._effects.live_settings.settings.origin.configured:
            raise RequestError(
                "unknown", "there is no configuration file; start with --config FILE to use one"
            )

        def done(answer: ConfigAnswer) -> None:
            if answer.failure:
                wrong = RequestError(answer.code, answer.failure, request.id)
                client.send_line(control_requests.refusal(wrong))
            else:
                result = {"changes": list(answer.changes), "needs_restart": list(answer.fixed)}
                client.send_line(control_requests.answer(request.id, result))

        if not self._effects.live_settings.compare(done):
            raise RequestError("busy", "another diff is in progress; try again later")

    def _begin_upgrade_check(self, client: Client, request: Request) -> None:
        """Begin an upgrade check; the answer follows when its trial process (upgrade.py) has ended.

        Raises RequestError.
        """

        def answered(version: str, failure: str) -> None:
            if not version and not failure:
                called_off = "the upgrade check was called off, because an upgrade has begun"
                client.send_line(
                    control_requests.refusal(RequestError("refused", called_off, request.id))
                )
                return
            result = {"from": __version__, "version": version or None, "reason": failure or None}
            client.send_line(control_requests.answer(request.id, result))

        self.supervisor.upgrade.end_unwanted_check()
        if self.supervisor.upgrade_waits_for() or self.supervisor.upgrade.is_checking:
            raise RequestError(
                "busy", "an upgrade or an upgrade check is in progress; try again later"
            )
        try:
            self.supervisor.check_upgrade(answered, lambda: client.gone)
        except (OSError, StateError) as error:
            what = what_failed(error) if isinstance(error, OSError) else str(error)
            why = f"cannot check the upgrade: copying the protector's state failed: {what}"
            raise RequestError("refused", why) from error

    # -- commands that change something ------------------------------------------

    def do_reload(
        self, dry_run: bool = False, canary: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        fleet = self.supervisor.fleet
        if dry_run and canary:
            raise RequestError("invalid", "reload: no canary in a dry run, which gets no clients")
        if dry_run:
            self._refuse_impossible_dry_run()
            self.runtime.post(DryRunRequested())
            return {"generation": fleet.next_generation}
        share = control_requests.canary_of(canary) if canary else None
        # If the reload reads the configuration again, live_settings.py checks the canary later:
        # only the new settings decide whether a canary is possible.
        if share and not (fleet.configured and fleet.served):
            self._refuse_impossible_canary()
        self.runtime.post(ReloadRequested(share))
        return {"generation": fleet.next_reload}

    def _refuse_impossible_canary(self) -> None:
        effects = self._effects
        cannot = no_canary_under(effects.live_settings.settings.policy)
        if cannot := cannot or effects.delivery.cannot_share(effects.delivery.listeners):
            raise RequestError("refused", f"no canary: {cannot}")

    def do_promote(self, now: bool = False) -> Mapping[str, Any]:
        fleet = self.supervisor.fleet
        settling = fleet.of(Phase.SETTLING)
        if cannot := cannot_promote(fleet, now=now):
            raise RequestError("refused", cannot)
        number = settling.number if settling else 0
        self.runtime.post(PromoteRequested(now, self._effects.met(number)))
        return {"generation": number}

    def do_deploy(
        self, release: str, expect: str = "", force: bool = False, dry_run: bool = False
    ) -> Mapping[str, Any]:
        fleet = self.supervisor.fleet
        if dry_run and not fleet.is_releasing:
            self._refuse_impossible_dry_run()
        return releases.deploy(
            *(self._effects, fleet, self.runtime, release),
            expect=expect,
            force=force,
            dry_run=dry_run,
        )

    def do_rollback(self, expect: str = "") -> Mapping[str, Any]:
        fleet = self.supervisor.fleet
        if cannot_call_off(fleet):  # no reload to call off: deploy an earlier release
            return releases.roll_back(self._effects, fleet, self.runtime, expect)
        releases.refuse_unexpected_incoming(self._effects, fleet, expect)
        self.runtime.post(RollbackRequested())
        return {"generation": fleet.incoming.number if fleet.incoming else fleet.next_generation}

    def _refuse_impossible_dry_run(self) -> None:
        if cannot := self.supervisor.cannot_dry_run():
            raise RequestError("refused", f"no dry run: {cannot}")

    def do_upgrade(self, check: bool = False) -> Mapping[str, Any]:
        # `check` is False here: handle() passes an upgrade check to _begin_upgrade_check().
        # Begin the upgrade later: the client must get the answer before this process executes the
        # new program.
        self.runtime.loop.call_after("upgrade-asked", 0.0, self.supervisor.begin_upgrade)
        return {"from": __version__, "starts": self._effects.reports.run.restarts + 1}

    def do_stop(self, quick: bool = False) -> Mapping[str, Any]:
        self.runtime.post(StopRequested(quick))
        return {}

    def do_lame_duck(self, on: bool) -> Mapping[str, Any]:
        self.runtime.post(LameDuckRequested(on))
        return {"lame_duck": self.supervisor.fleet.lame_duck.value}

    def do_scale(self, to: int | None = None, by: int = 0) -> Mapping[str, Any]:
        fleet = self.supervisor.fleet
        wanted = fleet.workers_wanted + by if to is None else to
        if wanted < 1:
            raise RequestError("refused", "cannot go below 1 worker; to end the service use `stop`")
        cannot = self.supervisor.scale(ScaleRequested(by, to))
        if cannot is not None:
            raise RequestError("refused", cannot)
        return {"workers": wanted}

    def do_hold(self, seconds: float) -> Mapping[str, Any]:
        cannot = self._effects.delivery.cannot_hold()
        if cannot is not None:
            raise RequestError("refused", f"hold is unavailable: {cannot}")
        settling = self.supervisor.fleet.of(Phase.SETTLING)
        left_s = rollout.settle_left_s(settling.number, self._effects) if settling else None
        self.runtime.post(HoldRequested(seconds, left_s))
        return {"until_at": time.time() + seconds}

    def do_release(self) -> Mapping[str, Any]:
        self.runtime.post(HoldReleased())
        return {}

    def do_replace(
        self, generation: int | None = None, pid: int | None = None
    ) -> Mapping[str, Any]:
        fleet = self.supervisor.fleet
        if pid is not None:
            return self._replace_worker(fleet, pid)
        found = fleet.generation(generation or 0)
        if found is None:
            raise _no_generation(generation)
        if found.phase in _ENDING:
            raise RequestError(
                "refused", f"generation {generation} is {found.phase.value} already; `kill` ends it"
            )
        if found.phase is not Phase.SERVING or fleet.is_changing:
            why = "a start, reload, dry run or replacement is in progress; try again later"
            raise RequestError("refused", why)
        if is_full(fleet):
            raise RequestError("refused", FULL)
        self.runtime.post(RenewRequested())
        return {"generation": generation}

    def _replace_worker(self, fleet: Fleet, pid: int) -> Mapping[str, Any]:
        for record in self._effects.pool.records():
            opened = self._effects.generations.get(record.generation)
            children = forked_children.children_of(record, opened) if opened is not None else []
            if any(each.pid == pid for each in children):
                return self._replace_child(record, pid)
        number = next((r.number for r in self._effects.pool.records() if r.pid == pid), None)
        found = fleet.find(number) if number is not None else None
        if found is None:
            name = self._effects.live_settings.settings.name
            why = f"process {pid} is not a worker of {name}; `status` lists the workers"
            raise RequestError("unknown", why)
        generation, worker = found
        if generation.phase is not Phase.SERVING or worker.state is not State.READY:
            raise RequestError(
                "refused",
                f"process {pid} is not a ready worker of the serving generation; see `status`",
            )
        self.runtime.post(ReplaceRequested(worker.number, "requested by an operator"))
        return {"worker": worker.number}

    def _replace_child(self, record: WorkerRecord, pid: int) -> Mapping[str, Any]:
        """Order a forked child to finish; the worker forks another child at once."""
        try:
            is_there = forked_children.retire(pid, record.pid)
        except OSError as error:
            raise RequestError("failed", f"cannot signal {pid}: {error.strerror}") from error
        if not is_there:
            raise RequestError("refused", f"child {pid} has already exited")
        self.runtime.log.write("info", "retired", worker=record.number, child=pid)
        return {"worker": record.number}

    def do_kill(self, generation: int) -> Mapping[str, Any]:
        fleet = self.supervisor.fleet
        found = fleet.generation(generation)
        if found is None:
            raise _no_generation(generation)
        if found.phase not in _ENDING:
            raise RequestError(
                "refused",
                f"generation {generation} is {found.phase.value}; {_before_kill(fleet, found)}",
            )
        self.runtime.post(KillRequested(generation))
        return {"workers": len(found.alive)}

    def do_log_level(self, level: str) -> Mapping[str, Any]:
        self.runtime.log.set_level(level)
        self.runtime.persist()
        return {"level": level}

    def do_reopen(self) -> Mapping[str, Any]:
        if why := self.supervisor.reopen_logs():
            raise RequestError("refused", f"not reopened: {why}; lines still go to the old file")
        return {}


def _no_generation(number: int | None) -> RequestError:
    return RequestError(
        "unknown", f"there is no generation {number}; `status` lists the generations"
    )


def _before_kill(fleet: Fleet, found: Generation) -> str:
    """Return what an operator must do before `kill` accepts a generation."""
    if found.phase is Phase.SERVING:
        return "`replace` it first"
    if found.fresh and not cannot_call_off(fleet):
        return "`rollback` first"
    instead = "if it becomes serving instead, `replace` it first"
    return f"try again when it is abandoned or draining; {instead}"
