"""Starts a worker: its descriptors, its environment, its process.

A worker knows only the numbers of its descriptors and what its environment says about them
(docs/protocol.md; where it accepts by itself, sd_listen_fds(3) and others).  It gets what its
delivery hands out, a RETURN line of its own and its slot of the scoreboard.

The open file description is shared, not the number: the channel's read end and the listening
sockets are the same ones in all workers and here.  So no flag of them is set for one worker.

Close our copies of the worker's ends right after the spawn, or we never see end of file.
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
from ..model.records import WorkerRecord
from ..model.settings import Settings
from ..system import inherited
from ..system.foreign_descriptors import drop_unread
from ..system.log import Log
from ..system.loop import Loop
from ..system.process import End, Process
from ..system.readiness import Readiness
from ..system.sd_notify import NotifySocket
from ..system.spawn import spawn
from .delivery import Delivery
from .generation import OpenGeneration
from .log_output import Output


@mutable
class Worker:
    """One process, and what it speaks with us by."""

    #: What another program would have to know.  Replaced whole, so that the checkpoint
    #: sees by identity what has changed.
    record: WorkerRecord
    generation: OpenGeneration  # not ours to close
    process: Process
    notify: NotifySocket
    line: socket.socket | None  # our end of its RETURN line, where it has one
    readiness: Readiness
    named: dict[str, int] = field(default_factory=dict)  # those of descriptors() that are kept
    ended: bool = False
    last_words: str | None = None  # of one that has ended; None: they are awaited, or not asked for
    told_end: End | None = None  # how it ended, from the guard
    end_due: bool = False  # that is awaited

    @property
    def has_served(self) -> bool:
        """Whether it was ready and lived: one that ends as it says so has not served."""
        return self.record.ready_at is not None

    def descriptors(self) -> dict[str, int]:
        """Return what an adopter needs, by name."""
        found = {
            "process": self.process.pidfd,
            "notify": self.notify.fileno(),
            **self.readiness.descriptors(),
        }
        if self.line is not None:
            found["line"] = self.line.fileno()
        return named(self.record.number, found)

    def close(self) -> None:
        """Close what it speaks with; its process may have left a group."""
        self.notify.close()
        self.readiness.close()
        if self.line is not None:
            drop_unread(self.line)
            self.line.close()


def named(number: int, descriptors: Mapping[str, int]) -> dict[str, int]:
    """Return a worker's descriptors by the names under which the next program finds them."""
    return {f"{inherited.WORKER}{number}.{name}": fd for name, fd in descriptors.items()}


def client_library_env(
    generation: OpenGeneration, slot: int, end: socket.socket, free: Iterator[int]
) -> tuple[dict[int, int], dict[str, str]]:
    """Return RETURN's far end and the scoreboard, number there -> ours; and what the environment
    says of them.

    One that accepts has them, too: it may be on the client library, which counts there and leaves
    when that line ends.
    """
    line = next(free)
    descriptors, told = {line: end.fileno()}, {wire.ENV_RETURN: str(line)}
    board, offset = generation.scoreboard_slot(slot) or (-1, 0)
    if board >= 0:
        number = next(free)
        descriptors[number] = board
        told[wire.ENV_SCOREBOARD] = f"{number}:{offset}"
    return descriptors, told


@mutable
class WorkerSpawner:
    """Starts workers, and takes over those of an earlier program."""

    settings: Settings
    loop: Loop
    log: Log
    output: Output
    delivery: Delivery

    _uids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        users = (self.settings.identity, self.settings.worker_identity)
        self._uids = frozenset({0, os.getuid(), *(each.uid for each in users if each)})

    def start(self, number: int, slot: int, generation: OpenGeneration) -> Worker:
        """Start a process with all it needs.  Raises OSError or ValueError, and leaves nothing."""
        program = generation.program
        with ExitStack() as ours:
            notify = self._notify_socket(number)
            ours.callback(notify.close)
            output_start = self.output.position()
            environment = {wire.ENV_NOTIFY: notify.address}
            if program.watchdog_s:
                environment["WATCHDOG_USEC"] = str(int(program.watchdog_s * 1_000_000))
            # --ready fd:N has that number for itself.
            free = (fd for fd in count(FIRST_FD) if fd != program.ready_fd)
            with ExitStack() as theirs:
                line, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.callback(line.close)
                theirs.callback(end.close)
                handles = self.delivery.worker_handles(generation, slot, free, self.settings)
                more, told_of_them = client_library_env(generation, slot, end, free)
                descriptors = handles.descriptors | more
                told = handles.environment | told_of_them
                offered = Readiness.offered(program, free, self.loop, number)
                readiness, its_ends, variables = theirs.enter_context(offered)
                output = theirs.enter_context(self.output.opened(number, generation.record.number))
                descriptors |= its_ends | output.places
                environment |= told | variables
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
        )
        return Worker(record, generation, process, notify, line, readiness)

    def adopt(
        self, record: WorkerRecord, descriptors: Mapping[str, int], generation: OpenGeneration
    ) -> Worker:
        """Take over one that an earlier program started, with its descriptors.

        Raises KeyError when one of these is missing.
        """
        notify = socket.socket(fileno=descriptors["notify"])
        own = {n: fd for n, fd in descriptors.items() if n not in ("notify", "process", "line")}
        line = descriptors.get("line")
        return Worker(
            record,
            generation,
            Process(record.pid, descriptors["process"]),
            NotifySocket(notify, self._address_of(record.number, notify), self._uids),
            socket.socket(fileno=line) if line is not None else None,
            Readiness(generation.program, own, self.loop, record.number),
        )

    # -- notify sockets --------------------------------------------------------

    def addresses(self, number: int) -> tuple[str, ...]:
        """Return where a worker's notify socket may be, the better address first."""
        name = f"{self.settings.secret}-{number}"
        # Any process that reads /proc/net/unix can fill the queue of an abstract one.
        abstract = f"@socketprotector-{name}"
        folder = self.settings.notify_folder
        return (f"{folder}/{name}", abstract) if folder else (abstract,)

    def _address_of(self, number: int, notify: socket.socket) -> str:
        """Return where this one is, which an earlier program has made."""
        first, *other = self.addresses(number)
        # getsockname() returns an abstract one as bytes.
        return other[0] if other and isinstance(notify.getsockname(), bytes) else first

    def _notify_socket(self, number: int) -> NotifySocket:
        """Make a worker's, abstract where the folder has none.  Raises OSError."""
        *better, abstract = self.addresses(number)
        for path in better:
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
