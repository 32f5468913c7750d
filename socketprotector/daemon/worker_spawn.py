"""Starts a worker: its descriptors, its environment, its process.

A worker gets the descriptors of the delivery (delivery/): the read end of the generation's channel,
or the listening sockets.  It also gets a slot of the scoreboard (memory for the workers' counts),
and a socket of its own, the RETURN line.  End of file on this line orders the worker to finish; we
read nothing from the line.  The worker's environment gives the numbers of the descriptors
(docs/protocol.md; for listening sockets also sd_listen_fds(3)).

A spawn changes no file status flag of the channel's read end or of a listening socket: we and all
workers share these flags (open(2), "open file description").

Right after the spawn we close our copies of the worker's ends of pipes and sockets.  Otherwise we
would never see end of file on our ends.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import count

from socketprotector_client import wire

from ..model.lazy_dataclass import field, mutable
from ..model.listen_fds import FIRST_FD
from ..model.records import Program, WorkerRecord
from ..model.settings import Settings
from ..system import inherited
from ..system.foreign_descriptors import close_unread
from ..system.log import Log
from ..system.loop import Loop
from ..system.process import End, Process, boot_ticks
from ..system.readiness import Readiness
from ..system.sd_notify import NotifySocket
from ..system.spawn import spawn
from .delivery import Delivery
from .generation import OpenGeneration
from .log_output import Output


@mutable
class Worker:
    """One worker process, and the sockets between it and us."""

    #: The record that the next program needs after an upgrade or a kill.  Always replace the whole
    #: record, because a checkpoint detects changes by identity.
    record: WorkerRecord
    generation: OpenGeneration  # close() leaves the generation open
    process: Process
    notify: NotifySocket
    #: Our end of the worker's RETURN line.  None: the worker has exited, or the line was lost when
    #: the protector was killed.  After the worker's exit, system/process_groups.py owns the line.
    #: That module closes the line when the worker's process group must finish, or is gone.
    line: socket.socket | None
    readiness: Readiness
    #: The descriptors of this worker that are in WorkerPool.descriptors, by the same names.
    registered: dict[str, int] = field(default_factory=dict)
    ended: bool = False  # PostMortem.end_of() has noticed the worker's exit
    last_words: str | None = None  # of an ended worker; None: not requested, or not received yet
    end_from_guard: End | None = None  # the worker's end, as the guard reported it
    awaits_end: bool = False  # we wait, or have waited, for the guard's report

    @property
    def became_ready(self) -> bool:
        """Return whether we learned that the worker was ready before we noticed its exit.

        If we learn this only after the exit, only record.ready_by is set.
        """
        return self.record.ready_at is not None

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors that the next program needs, by name."""
        found = {
            "process": self.process.pidfd,
            "notify": self.notify.fileno(),
            **self.readiness.descriptors(),
        }
        if self.line is not None:
            found["line"] = self.line.fileno()
        return full_names(self.record.number, found)

    def close(self) -> None:
        """Close the worker's sockets.  Leave `process` open: process_groups.py still needs it."""
        self.notify.close()
        self.readiness.close()
        if self.line is not None:
            close_unread(self.line)


def full_names(number: int, descriptors: Mapping[str, int]) -> dict[str, int]:
    """Return a worker's descriptors by the names that the next program looks for."""
    return {f"{inherited.WORKER}{number}.{name}": fd for name, fd in descriptors.items()}


def client_library_env(
    generation: OpenGeneration, slot: int, end: socket.socket, free: Iterator[int]
) -> tuple[dict[int, int], dict[str, str]]:
    """Return the descriptors and the environment variables that the client library uses.

    The descriptors (number in the worker -> ours) are the scoreboard and `end`, the worker's end of
    the RETURN line.  The client library uses both under --handoff listener, too.

    free: descriptor numbers that are unused in the worker.
    """
    line = next(free)
    descriptors, environment = {line: end.fileno()}, {wire.ENV_RETURN: str(line)}
    board, offset = generation.scoreboard_slot(slot) or (-1, 0)
    if board >= 0:
        number = next(free)
        descriptors[number] = board
        environment[wire.ENV_SCOREBOARD] = f"{number}:{offset}"
    return descriptors, environment


def _spread_variables(program: Program) -> dict[str, str]:
    times = {
        wire.ENV_DRAIN_SPREAD: program.drain_spread_s,
        wire.ENV_STOP_SPREAD: program.stop_spread_s,
    }
    return {
        name: f"{seconds:.3f}".rstrip("0").rstrip(".") for name, seconds in times.items() if seconds
    }


@mutable
class WorkerSpawner:
    """Starts workers, and adopts workers that an earlier program started."""

    settings: Settings
    loop: Loop
    log: Log
    output: Output
    delivery: Delivery

    _uids: frozenset[int] = frozenset()  # the users that may send to the notify sockets

    def __post_init__(self) -> None:
        other = self.settings.worker_identity
        self._uids = frozenset({0, os.getuid(), *((other.uid,) if other else ())})

    def start(self, number: int, slot: int, generation: OpenGeneration) -> Worker:
        """Start a worker process.  Raises OSError or ValueError; then nothing is left open."""
        program, began = generation.program, boot_ticks()
        with ExitStack() as ours:
            notify = self._notify_socket(number)
            ours.callback(notify.close)
            output_start = self.output.position()
            environment = {wire.ENV_NOTIFY: notify.address}
            if self.settings.log_prefix:
                environment[wire.ENV_LOG_PREFIX] = "1"
            if program.spreads:
                environment |= _spread_variables(program)
            if program.watchdog_s:
                environment["WATCHDOG_USEC"] = str(int(program.watchdog_s * 1_000_000))
            # The number of --ready fd:N is reserved.
            free = (fd for fd in count(FIRST_FD) if fd != program.ready_fd)
            with ExitStack() as theirs:
                line, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.callback(line.close)
                theirs.callback(end.close)
                handles = self.delivery.worker_handles(generation, slot, free, self.settings)
                library_fds, library_environment = client_library_env(generation, slot, end, free)
                descriptors = handles.descriptors | library_fds
                environment |= handles.environment | library_environment
                offered = Readiness.offered(program, free, self.loop, number)
                readiness, ready_ends, ready_variables = theirs.enter_context(offered)
                output = theirs.enter_context(self.output.opened(number, generation.record.number))
                descriptors |= ready_ends | output.descriptors
                environment |= ready_variables
                process = spawn(program, environment, descriptors, handles.pid_in)
                output.pid = process.pid
            ours.pop_all()
        record = WorkerRecord(
            number,
            generation.record.number,
            process.pid,
            output_start,
            slot=slot,
            started_at=time.time(),
            start=began,
        )
        return Worker(record, generation, process, notify, line, readiness)

    def adopt(
        self, record: WorkerRecord, descriptors: Mapping[str, int], generation: OpenGeneration
    ) -> Worker:
        """Adopt a worker that an earlier program started; take ownership of its descriptors.

        Raises KeyError if the worker's process or notify socket is missing.
        """
        notify = socket.socket(fileno=descriptors["notify"])
        others = {n: fd for n, fd in descriptors.items() if n not in ("notify", "process", "line")}
        line = descriptors.get("line")
        return Worker(
            record,
            generation,
            Process(record.pid, descriptors["process"]),
            NotifySocket(notify, self._address_of(record.number, notify), self._uids),
            socket.socket(fileno=line) if line is not None else None,
            Readiness(generation.program, others, self.loop, record.number),
        )

    # -- notify sockets --------------------------------------------------------

    def addresses(self, number: int) -> tuple[str, ...]:
        """Return the addresses that a worker's notify socket can have, the preferred one first."""
        name = f"{self.settings.secret}-{number}"
        # Prefer a path: any process can find an abstract socket, and fill its queue.
        abstract = f"@socketprotector-{name}"
        folder = self.settings.notify_folder
        return (f"{folder}/{name}", abstract) if folder else (abstract,)

    def _address_of(self, number: int, notify: socket.socket) -> str:
        """Return the address of a notify socket that an earlier program made."""
        first, *other = self.addresses(number)
        # getsockname() returns an abstract address as bytes.
        return other[0] if other and isinstance(notify.getsockname(), bytes) else first

    def _notify_socket(self, number: int) -> NotifySocket:
        """Bind a worker's notify socket: to its path, or to its abstract address if that fails.

        Raises OSError.
        """
        *paths, abstract = self.addresses(number)
        for path in paths:
            try:
                return NotifySocket.make(path, self._uids)
            except OSError as error:
                self.log.write(
                    "warning",
                    "notify-socket-abstract",
                    worker=number,
                    folder=self.settings.notify_folder,
                    error=error.strerror,
                )
        return NotifySocket.make(abstract, self._uids)
