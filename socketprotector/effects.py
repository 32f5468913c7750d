"""Carries out the actions that the lifecycle orders, and turns what comes back into events.

The only place that logs the lifecycle.  Each descriptor has one owner here: a generation
its channel, a worker its process, notify socket and RETURN line.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from socketprotector_client import wire

from . import envfile
from .channel import Channel
from .events import (
    Action,
    BacklogEmptied,
    CancelTimer,
    ChannelBroken,
    CloseListeners,
    Deadline,
    DeadlinePassed,
    Drain,
    Event,
    Exit,
    News,
    Open,
    OpenFailed,
    Release,
    Report,
    Retire,
    RouteTo,
    Sign,
    Signal,
    Spawn,
    StartTimer,
    TimeExtended,
    WorkerExited,
    WorkerReady,
)
from .forwarder import Forwarder
from .launcher import Launcher
from .listener import Listener
from .log import Log
from .loop import Loop
from .notify import NotifySocket, Systemd
from .output import Output
from .process import Process, Program, resolve, spawn
from .settings import Settings

#: Where a worker finds its channel and its RETURN line.
_CHANNEL_FD, _RETURN_FD = 3, 4
#: What belongs to the protector alone and must not reach a worker.
_PRIVATE = ("NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "SOCKETPROTECTOR_", "FDSTORE")

_LEVELS = {
    News.RELOAD_FAILED: "error",
    News.START_FAILED: "error",
    News.RETRYING: "warning",
    News.MANY_DRAINING: "warning",
    News.REFUSED: "warning",
    News.EXITED: "warning",
    News.BROKEN: "error",
}


@dataclass(slots=True)
class _Generation:
    program: Program
    channel: Channel
    serving_since: float = 0.0


@dataclass(slots=True)
class _Worker:
    generation: int
    process: Process
    notify: NotifySocket
    line: socket.socket  # our end of its RETURN line
    mark: int  # where the output stood when it began
    ready_at: float | None = None


class Effects:
    """The fleet's other half: what the numbers in it stand for."""

    def __init__(
        self,
        settings: Settings,
        listeners: list[Listener],
        *,
        loop: Loop,
        log: Log,
        output: Output,
        systemd: Systemd,
        launcher: Launcher,
        post: Callable[[Event], None],
    ) -> None:
        """Take ownership of the listeners.  `post` hands an event to the supervisor."""
        self._settings = settings
        self._loop = loop
        self._log = log
        self._output = output
        self._systemd = systemd
        self._launcher = launcher
        self._post = post
        self._addresses = wire.pack_listeners([each.settings.address for each in listeners])
        self._uids = frozenset(
            {0, os.getuid()} | ({settings.identity.uid} if settings.identity else set())
        )
        self._generations: dict[int, _Generation] = {}
        self._workers: dict[int, _Worker] = {}
        self._route: int | None = None
        self._good: Program | None = None  # what served last
        self.exit_status: int | None = None
        self._forwarder = Forwarder(
            loop,
            listeners,
            broken=self._broken,
            emptied=lambda: post(BacklogEmptied()),
            trouble=self._trouble,
        )

    def perform(self, action: Action) -> None:
        """Carry out one action.  What fails comes back as an event."""
        match action:
            case Open(number, fresh):
                self._open(number, fresh)
            case Spawn(number, worker, slot):
                self._spawn(number, worker, slot)
            case Signal(worker, sign):
                self._signal(worker, sign)
            case Retire(worker) if worker in self._workers:
                self._workers[worker].line.shutdown(socket.SHUT_RDWR)
            case RouteTo(number):
                self._route_to(number)
            case Drain(number) if number in self._generations:
                self._forwarder.drain(self._generations[number].channel)
            case Release(number) if number in self._generations:
                self._forwarder.release(self._generations.pop(number).channel)
            case CloseListeners(quick):
                self._forwarder.close_listeners(quick=quick)
            case StartTimer(deadline, seconds, True):
                self._loop.extend(deadline, seconds)
            case StartTimer(deadline, seconds):
                self._start_timer(deadline, seconds)
            case CancelTimer(deadline):
                self._loop.cancel(deadline)
            case Report():
                self._report(action)
            case Exit(status):
                self.exit_status = status
                self._loop.running = False
            case _:  # of a generation that could not be opened
                pass

    # -- generations ---------------------------------------------------------

    def _open(self, number: int, fresh: bool) -> None:
        try:
            program = self._good if self._good and not fresh else self._program()
            channel = Channel(self._settings.queue)
        except (OSError, ValueError) as error:
            self._post(OpenFailed(number, _what_failed(error)))
            return
        self._generations[number] = _Generation(program, channel)
        if channel.capacity < self._settings.queue:
            self._log.write(
                "warning",
                "queue-clamped",
                wanted=self._settings.queue,
                got=channel.capacity,
                hint="raise the sysctl net.core.wmem_max",
            )

    def _program(self) -> Program:
        """Resolve the command as it is now.  Raises OSError or ValueError."""
        settings = self._settings
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(_PRIVATE)
        }
        if settings.env_file is not None:
            environment.update(envfile.read(settings.env_file))
        environment.update(settings.environment)
        directory = os.path.realpath(settings.directory, strict=True)
        path, argv = resolve(settings.command, directory, environment.get("PATH", os.defpath))
        environment["PWD"] = directory
        return Program(
            path=path,
            argv=argv,
            directory=directory,
            environment=tuple(environment.items()),
            umask=settings.umask,
            limits=tuple({"nofile": settings.nofile_soft, **dict(settings.limits)}.items()),
            nice=settings.nice,
        )

    def _route_to(self, number: int | None) -> None:
        generation = self._generations.get(number) if number is not None else None
        self._route = number if generation is not None else None
        if generation is None:
            self._forwarder.route_to(None)
            return
        generation.serving_since = time.monotonic()
        self._good = generation.program
        self._forwarder.route_to(generation.channel)
        self._log.write("info", "route", generation=number)

    def _broken(self) -> None:
        if self._route is not None:
            served_s = time.monotonic() - self._generations[self._route].serving_since
            self._post(ChannelBroken(self._route, served_s))

    def _trouble(self, call: str, error: OSError) -> None:
        self._log.write(
            "error", "held", call=call, error=error.strerror, hint="accepting again by a timer"
        )

    # -- workers -------------------------------------------------------------

    def _spawn(self, number: int, worker: int, slot: int) -> None:
        generation = self._generations.get(number)
        if generation is None:
            return  # could not be opened, and that was told
        closing: list[socket.socket] = []
        try:
            notify = NotifySocket(self._uids)
            closing.append(notify.socket)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            closing.extend((ours, theirs))
            mark = self._output.mark()
            process = spawn(
                generation.program,
                {
                    wire.ENV_CHANNEL: str(_CHANNEL_FD),
                    wire.ENV_RETURN: str(_RETURN_FD),
                    wire.ENV_LISTENERS: self._addresses,
                    wire.ENV_GENERATION: str(number),
                    wire.ENV_WORKER: str(slot),
                    wire.ENV_NOTIFY: notify.address,
                },
                {_CHANNEL_FD: generation.channel.read.fileno(), _RETURN_FD: theirs.fileno()},
            )
        except OSError as error:
            for each in closing:
                each.close()
            self._post(WorkerExited(worker, f"cannot start: {_what_failed(error)}"))
            return
        theirs.close()
        self._workers[worker] = _Worker(number, process, notify, ours, mark)
        self._loop.watch(process.pidfd, lambda: self._ended(worker))
        self._loop.watch(notify.fileno(), lambda: self._heard(worker))
        if self._settings.ready_after_s is not None:
            self._loop.call_after(
                ("ready", worker), self._settings.ready_after_s, lambda: self._is_ready(worker)
            )
        self._log.write(
            "info", "spawned", generation=number, worker=worker, slot=slot, pid=process.pid
        )

    def _heard(self, number: int) -> None:
        """Handle what a worker has said on its notify socket."""
        worker = self._workers[number]
        while (message := worker.notify.receive(worker.process.pid)) is not None:
            fields = message.fields
            if fields.get("READY") == "1" and self._settings.ready_after_s is None:
                self._is_ready(number, retires=fields.get(_RETIRES[0]) == _RETIRES[1])
            usec = fields.get("EXTEND_TIMEOUT_USEC", "")
            if usec.isdigit() and len(usec) < 16:
                self._post(TimeExtended(number, int(usec) / 1_000_000))
            if "STATUS" in fields:
                self._log.write("debug", "status", worker=number, status=fields["STATUS"])
            if message.barrier >= 0:
                os.close(message.barrier)

    def _is_ready(self, number: int, *, retires: bool = False) -> None:
        worker = self._workers.get(number)
        if worker is None or worker.ready_at is not None:
            return
        worker.ready_at = time.monotonic()
        self._log.write("info", "worker-ready", generation=worker.generation, worker=number)
        self._post(WorkerReady(number, retires))

    def _ended(self, number: int) -> None:
        """Take in a worker's end, after what it had still said."""
        self._heard(number)
        worker = self._workers[number]
        result = worker.process.reap()
        if result is None:
            return
        clean, how = result
        del self._workers[number]
        self._loop.unwatch(worker.process.pidfd)
        self._loop.unwatch(worker.notify.fileno())
        self._loop.cancel(("ready", number))
        worker.process.close()
        worker.notify.close()
        worker.line.close()
        generation = self._generations[worker.generation]
        self._log.write("info", "exited", generation=worker.generation, worker=number, how=how)
        served_s = 0.0
        if worker.ready_at is not None:
            served_s = time.monotonic() - worker.ready_at
            reason = how
        else:
            reason = f"{self._settings.command[0]} {how} before it was ready"
            if clean:
                reason += "; does it detach itself? run it in the foreground"
            last = self._output.last_words(worker.mark)
            if last:
                reason += f"; its last words:\n{last}"
        self._post(
            WorkerExited(
                number,
                reason,
                served_s=served_s,
                waiting=generation.channel.depth(),
                detached=clean and worker.ready_at is None,
            )
        )

    def _signal(self, number: int, sign: Sign) -> None:
        worker = self._workers.get(number)
        if worker is None:
            return
        if sign is Sign.KILL:
            worker.process.kill_group()
        else:
            worker.process.signal(signal.SIGTERM)
        self._log.write("info", "signalled", worker=number, signal=sign.value)

    # -- time and news -------------------------------------------------------

    def _start_timer(self, deadline: Deadline, seconds: float) -> None:
        self._loop.call_after(deadline, seconds, lambda: self._post(DeadlinePassed(deadline)))

    def _report(self, report: Report) -> None:
        """Tell the log, systemd and the launcher."""
        first_line, _, _ = report.reason.partition("\n")
        self._log.write(
            _LEVELS.get(report.news, "info"),
            report.news.value,
            generation=report.generation or None,
            reason=first_line or None,
        )
        serves = f"generation {report.generation} serves"
        match report.news:
            case News.READY:
                self._systemd.send(READY="1", MAINPID=str(os.getpid()), STATUS=serves)
                self._launcher.started()
            case News.RELOADING:
                self._systemd.reloading()
            case News.RELOADED:
                self._systemd.send(READY="1", STATUS=serves)
            case News.RELOAD_FAILED:
                # There is no word for "failed": ready again, and why in the status.
                self._systemd.send(READY="1", STATUS=f"reload failed: {first_line}")
            case News.START_FAILED:
                self._systemd.send(STATUS=f"start failed: {first_line}")
                self._launcher.failure = report.reason
            case News.STOPPING:
                self._systemd.send(STOPPING="1", STATUS="stopping")

    def close(self) -> None:
        """Close what is left when nothing is supervised any more."""
        self._forwarder.close()
        self._log.write(
            "info",
            "stopped",
            connections=self._forwarder.forwarded,
            lost=self._forwarder.lost or None,
        )


_RETIRES = wire.RETIRES_ON_RETURN.split("=")


def _what_failed(error: Exception) -> str:
    """Say an error's cause and the file it is about."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
