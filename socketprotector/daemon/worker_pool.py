"""The worker processes behind the numbers: start them, hear them, signal them, see them end.

Effects says what is to be done with a worker; what comes back is an event.  Each worker
here owns its process, its notify socket and our end of its RETURN line.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count

from socketprotector_client import wire

from ..core.events import (
    Event,
    ReplaceRequested,
    TimeExtended,
    WorkerExited,
    WorkerReady,
    WorkerSignal,
)
from ..model import known_servers
from ..model.handoff import CONNECTION, FIRST_FD, LISTENER, told_to
from ..model.history import Crash
from ..model.records import WorkerRecord
from ..model.settings import Settings
from ..model.text import LAST_WORDS
from ..system import clock, inherited
from ..system.log import Log
from ..system.loop import Loop
from ..system.orphans import Orphans
from ..system.process import End, Process, spawn
from ..system.process_groups import Groups
from ..system.procfs import sockets_of
from ..system.readiness import CHECK_LIMIT_S, Readiness, check_program
from ..system.sd_notify import NotifySocket, discard_all
from ..system.sock_diag import address_of
from . import worker_limits
from .generation import Home, known
from .output import Output

#: So that --ready check:COMMAND can ask the right one: the port is the old ones', too.
_WORKER_PID = "SOCKETPROTECTOR_WORKER_PID"
_SIGNALS = {
    WorkerSignal.TERM: signal.SIGTERM,
    WorkerSignal.ABRT: signal.SIGABRT,
    WorkerSignal.KILL: signal.SIGKILL,
}
#: So many descriptors of workers are looked at for one that listens: each takes microseconds.
_LOOKED_AT = 1000
#: What is kept of a STATUS= line.
_STATUS_CHARACTERS = 500
#: Messages heard in one go: whoever sends without end must not keep us from the rest.
#: More than the kernel queues (net.unix.max_dgram_qlen, 10 to 512), so nothing said before
#: a worker's end is missed.
_HEARD_AT_ONCE = 1024
#: How long to wait before listening again to one who could not be heard.
_HEAR_AGAIN_S = 0.1
#: How soon to ask again for the end of a worker that has ended, and that somebody traces.
_REAP_AGAIN_S = 0.1
#: How long the guard may take to tell how a worker ended.
_STATUS_S = 1.0
#: Microseconds a worker may ask for, in digits: some 30 years.
_USEC_DIGITS = 15


@dataclass(slots=True)
class _Worker:
    """One process, and how it speaks with us."""

    #: What another program would have to know.  Replaced whole, so that who writes it down sees
    #: at a glance which ones are others than before.
    record: WorkerRecord
    home: Home  # its generation's, not ours to close
    process: Process
    notify: NotifySocket
    line: socket.socket | None  # our end of its RETURN line, where it has one
    readiness: Readiness
    died_saying_so: bool = False
    status_due: bool = False  # it has ended, and who has reaped it is to say how
    last_words: str | None = None  # it has ended, and this is known; None: not asked for
    asked: bool = False  # for them
    named: dict[str, int] = field(default_factory=dict)  # of descriptors(), with whole names

    def descriptors(self) -> dict[str, int]:
        """What an adopter needs, by name."""
        before = f"{inherited.WORKER}{self.record.number}."
        found = {
            f"{before}process": self.process.pidfd,
            f"{before}notify": self.notify.fileno(),
            **{f"{before}{name}": fd for name, fd in self.readiness.descriptors().items()},
        }
        if self.line is not None:
            found[f"{before}line"] = self.line.fileno()
        return found

    @property
    def accepts(self) -> bool:
        """Whether it takes connections from the listeners: then a signal has it finish."""
        return self.home.program.handoff == LISTENER

    def close(self) -> None:
        """Close what it speaks with; its process may have left a group."""
        self.notify.close()
        self.readiness.close()
        if self.line is not None:
            discard_all(self.line)


class WorkerPool:
    """All workers that live."""

    def __init__(
        self,
        settings: Settings,
        *,
        loop: Loop,
        log: Log,
        output: Output,
        post: Callable[[Event], None],
        crashed: Callable[[Crash], None],
        late: Callable[[int, str], None],
        listeners: Callable[[int], Mapping[int, int]],
    ) -> None:
        """`post` hands an event to the supervisor; `crashed` is told what nobody wanted.

        late: told a crashed worker's last words, where they come after that.

        listeners: the descriptors, by index, of those that workers of socket 0 or 1 accept from.
        """
        self._settings = settings
        self._loop = loop
        self._log = log
        self._output = output
        self._post = post
        self._crashed = crashed
        self._late = late
        self._listeners = listeners
        users = (settings.identity, settings.worker_identity)
        self._uids = frozenset({0, os.getuid(), *(each.uid for each in users if each)})
        self._workers: dict[int, _Worker] = {}
        self._records: dict[int, WorkerRecord] = {}  # theirs, for all are asked for at each step
        self._by_pid: dict[int, int] = {}
        self._expected: dict[int, WorkerRecord] = {}  # an earlier program's, soon to be adopted
        #: All descriptors of workers that another program would need, those of their output too.
        self.descriptors = output.named
        self._statuses: dict[int, tuple[bool, str]] = {}  # pid -> told by who has reaped it
        self._guarded = settings.guarded  # somebody tells how workers ended that we adopted
        if settings.worker_limits.any:
            loop.call_after("limits", worker_limits.EVERY_S, self._look_at_limits)
        self._blind = False  # no worker's memory can be looked at, and that was said
        #: Whether a worker has said that it is ready: then the program speaks with us.
        self.spoken_with = False
        self._groups = Groups(
            loop, log, self.descriptors, lambda number: post(WorkerExited(number, "orphans gone"))
        )
        kill_timeout_s, identity = settings.policy.kill_timeout_s, settings.worker_identity
        self._orphans = Orphans(loop, log, kill_timeout_s, identity, self._groups.has)

    def settings_are(self, settings: Settings) -> None:
        """A reload has changed them."""
        self._settings = settings
        self._loop.cancel("limits")
        if settings.worker_limits.any:
            self._loop.call_after("limits", worker_limits.EVERY_S, self._look_at_limits)

    def advice(self, generation: int, *, passes_over: bool = False) -> str:
        """Say what to do about a generation of which no worker takes a connection, if known.

        passes_over: there is one to be taken.
        """
        its = [each for each in self._workers.values() if each.record.generation == generation]
        if not its:
            return ""
        # They are all of one program; of thousands, or of one with as many files, a part is asked.
        pids = [each.process.pid for each in its]
        handed = {
            os.fstat(fd).st_ino
            for socket_number in (0, 1)
            for fd in self._listeners(socket_number).values()
        }
        return known_servers.advice(
            its[0].home.program,
            listens=lambda: address_of(sockets_of(pids, _LOOKED_AT) - handed),
            passes_over=passes_over,
        )

    # -- orders --------------------------------------------------------------

    def spawn(self, number: int, slot: int, generation: int, home: Home) -> None:
        """Start a worker.  What fails is its exit."""
        try:
            worker = self._start(number, slot, generation, home)
        except (OSError, ValueError) as error:
            self._post(WorkerExited(number, f"cannot start: {what_failed(error)}"))
            return
        try:
            self._watch(number, worker)
        except OSError as error:
            self._loop.unwatch(worker.process.pidfd)
            self._loop.unwatch(worker.notify.fileno())
            worker.process.discard(self._loop)
            worker.close()
            self._post(WorkerExited(number, f"cannot watch it: {what_failed(error)}"))
            return
        self._log.write(
            "info",
            "spawned",
            generation=generation,
            worker=number,
            slot=slot,
            pid=worker.process.pid,
        )

    def signal(self, number: int, sign: WorkerSignal) -> None:
        """Send a signal, KILL to the whole process group; nothing happens to one that is gone."""
        worker = self._workers.get(number)
        if worker is None:
            self._groups.signal(number, _SIGNALS[sign])
            return
        if sign is WorkerSignal.KILL:
            sent = self._send(number, worker, sign.value, worker.process.kill_group)
            if sent:
                self._note(worker, killed=True)
        else:
            sent = self._send(number, worker, sign.value, worker.process.signal, _SIGNALS[sign])
        if not sent:
            return
        aborted = worker.record.aborted or sign is WorkerSignal.ABRT
        told_to_go = worker.record.told_to_go or not aborted
        self._note(worker, aborted=aborted, told_to_go=told_to_go)

    def retire(self, number: int) -> None:
        """Have a worker finish: by the end of its RETURN line, or by a signal."""
        worker = self._workers.get(number)
        if worker is None:
            self._groups.retire(number)
            return
        if worker.accepts:
            self._tell_to_finish(number, worker)
        elif worker.line is not None:
            worker.line.shutdown(socket.SHUT_WR)  # what it says on it can still be heard
        self._note(worker, told_to_go=True)
        self._log.write("info", "retired", worker=number)

    def drain(self, generation: int) -> None:
        """Have those finish who accept themselves; the others read the end of their channel."""
        for number, worker in self._workers.items():
            known = worker.record
            if known.generation == generation and worker.accepts and not known.told_to_go:
                self._tell_to_finish(number, worker)

    def _tell_to_finish(self, number: int, worker: _Worker) -> None:
        sign = signal.Signals(worker.home.program.drain_signal)
        self._send(number, worker, sign.name.removeprefix("SIG"), worker.process.signal, sign)
        self._note(worker, told_to_go=True)

    def _send(
        self, number: int, worker: _Worker, name: str, act: Callable[..., None], *arguments: int
    ) -> bool:
        """Send a signal by the act given, and log that; return whether we may."""
        try:
            act(*arguments)
        except PermissionError as error:  # it has become another user's
            self._log.write(
                "error",
                "cannot-signal",
                worker=number,
                pid=worker.process.pid,
                signal=name,
                error=error.strerror,
            )
            return False
        self._log.write("info", "signalled", worker=number, signal=name)
        return True

    def stop_checking(self) -> None:
        """End what only this program knows of; the next one begins it anew."""
        for worker in self._workers.values():
            worker.readiness.stop_check()
        self._orphans.stop_looking()

    def go_on_checking(self) -> None:
        """There was no next one."""
        for worker in self._workers.values():
            worker.readiness.check()
        self._orphans.go_on_looking()

    def when_ended(self, done: Callable[[], None]) -> None:
        """Call back when nothing is left of the workers that never served."""
        self._orphans.when_ended(done)

    # -- to the next program and from the one before -----------------------------

    def _note(self, worker: _Worker, **changes: object) -> None:
        """Have other fields in the record of a worker."""
        worker.record = replace(worker.record, **changes)  # type: ignore[arg-type]
        number = worker.record.number
        if number in self._workers:  # else it could not be watched, or has ended
            self._records[number] = worker.record

    def records(self) -> tuple[WorkerRecord, ...]:
        """Return what is known of each worker."""
        return (*self._records.values(), *self._groups.records(), *self._expected.values())

    def expect(self, record: WorkerRecord, descriptors: Mapping[str, int]) -> None:
        """Have a worker known, to whoever goes on if we are killed, until it is adopted."""
        self._expected[record.number] = record
        for name, fd in descriptors.items():
            self.descriptors[f"{inherited.WORKER}{record.number}.{name}"] = fd

    def _no_longer_expect(self, number: int, descriptors: Iterable[str]) -> None:
        """Forget what is known by its process, or by its group, from here on."""
        if self._expected.pop(number, None) is not None:
            for name in descriptors:
                del self.descriptors[f"{inherited.WORKER}{number}.{name}"]

    def adopt(self, record: WorkerRecord, descriptors: Mapping[str, int], home: Home) -> None:
        """Go on with a worker that an earlier program started; takes ownership.

        Raises KeyError when a descriptor is missing, OSError when it cannot be watched.
        """
        notify = socket.socket(fileno=descriptors["notify"])
        more = {n: fd for n, fd in descriptors.items() if n not in ("notify", "process", "line")}
        line = descriptors.get("line")
        self._no_longer_expect(record.number, descriptors)
        self.spoken_with = self.spoken_with or record.ready_by not in ("", "timer")
        worker = _Worker(
            record,
            home,
            Process(record.pid, descriptors["process"]),
            NotifySocket(notify, self._address_of(record.number, notify), self._uids),
            socket.socket(fileno=line) if line is not None else None,
            Readiness(home.program, more),
        )
        self._watch(record.number, worker)

    def adopt_group(self, record: WorkerRecord, descriptors: Mapping[str, int], home: Home) -> bool:
        """Go on with what a worker has left that has ended; takes ownership of its descriptors.

        Returns whether anything is.
        """
        self._no_longer_expect(record.number, descriptors)
        for name, fd in descriptors.items():
            if name != "process":
                os.close(fd)  # it was to be given up
        process = Process(record.pid, descriptors["process"])
        try:
            process.reap()
        except ChildProcessError:
            pass  # it was another's child
        return self._keep_group(record, process, home)

    def _keep_group(self, record: WorkerRecord, process: Process, home: Home) -> bool:
        """Look after what is left of a worker's process group; say whether anything is."""
        left = process.has_group()
        if left:
            program = home.program
            sign = program.drain_signal if program.handoff == LISTENER else 0
            self._groups.keep(record, process, sign)
        else:
            process.close()
        return left

    def lost(self, number: int) -> None:
        """A worker was being started when the earlier program was killed: end what there is."""
        for address in self._addresses(number):
            self._orphans.end(address)

    def unguarded(self) -> None:
        """Nobody is left who would tell how a process ended that is no child of ours."""
        self._guarded = False

    @property
    def orphans(self) -> tuple[str, ...]:
        """The notify addresses of workers that have left something behind."""
        return self._orphans.left

    def adopt_orphans(self, addresses: Iterable[str]) -> None:
        """Go on ending what workers of an earlier program have left behind."""
        for each in addresses:
            self._orphans.end(each)

    def others_ended(self) -> None:
        """Somebody has reaped a process that was no worker; it may have been one's child."""
        self._groups.look()

    def told(self, pid: int, clean: bool, how: str) -> None:
        """Learn how a process ended from who has reaped it, because it was no child of ours."""
        self.others_ended()
        number = self._by_pid.get(pid)
        if number is not None:
            self._statuses[pid] = clean, how
            if self._workers[number].status_due:
                self._ended(number)

    def acked(self, pid: int) -> None:
        """A worker says by another way than its own line that it is ready (einhorn's)."""
        number = self._by_pid.get(pid)
        if number is not None and self._workers[number].readiness.by_ack:
            self._is_ready(number, "ack")

    # -- what comes back -----------------------------------------------------

    def _addresses(self, number: int) -> tuple[str, ...]:
        """Return where a worker's notify socket may be, the better place first."""
        name = f"{self._settings.secret}-{number}"
        abstract = f"@socketprotector-{name}"
        folder = self._settings.notify_folder
        return (f"{folder}/{name}", abstract) if folder else (abstract,)

    def _address_of(self, number: int, notify: socket.socket) -> str:
        """Return where this one is, which an earlier program has made."""
        first, *other = self._addresses(number)
        # The name of an abstract one is told as bytes.
        return other[0] if other and isinstance(notify.getsockname(), bytes) else first

    def _notify_socket(self, number: int) -> NotifySocket:
        """Make a worker's, abstract where the folder has none.  Raises OSError."""
        *better, abstract = self._addresses(number)
        for path in better:
            try:
                return NotifySocket.make(path, self._uids)
            except OSError as error:
                self._log.write(
                    "warning",
                    "notify-socket-abstract",
                    worker=number,
                    folder=self._settings.notify_folder,
                    error=error.strerror,
                )
        return NotifySocket.make(abstract, self._uids)

    def _watch(self, number: int, worker: _Worker) -> None:
        self._loop.watch(worker.process.pidfd, lambda: self._ended(number))
        self._loop.watch(worker.notify.fileno(), lambda: self._heard(number))
        program = check_program(worker.home.program)
        worker.readiness.watch(
            self._loop,
            number,
            lambda by: self._is_ready(number, by),
            lambda: spawn(program, {_WORKER_PID: str(worker.process.pid)}, {}, mortal=True),
            lambda check: self._log.write(
                "warning", "check-hangs", worker=number, check=check, for_s=CHECK_LIMIT_S
            ),
            lambda: self._name(worker),
            known=worker.record.ready_at is not None,
        )
        self._workers[number] = worker
        self._records[number] = worker.record
        self._by_pid[worker.process.pid] = number
        self._name(worker)
        self._wait_for_word(number, worker)

    def _name(self, worker: _Worker) -> None:
        """Have its descriptors kept that it has now, and no others."""
        if worker.record.number not in self._workers:
            return  # it could not be watched, or has ended
        before, worker.named = worker.named, worker.descriptors()
        for name in before.keys() - worker.named.keys():
            del self.descriptors[name]
        for name in worker.named.keys() - before.keys():
            self.descriptors[name] = worker.named[name]

    def _wait_for_word(self, number: int, worker: _Worker) -> None:
        """Replace a worker that says nothing for too long from here on.

        One that has spoken before it was ready has all the time that a start has.
        """
        limit_s = worker.home.program.watchdog_s
        if limit_s and worker.record.watched and worker.record.ready_at is not None:

            def silent() -> None:
                self._heard(number)  # it may be we who could not listen for so long
                if self._loop.due(("word", number)) is not None:
                    return
                reason = f"no WATCHDOG=1 for {limit_s:g} s"
                self._log.write("error", "hangs", worker=number, reason=reason)
                self._post(ReplaceRequested(number, reason, hung=True))

            self._loop.call_after(("word", number), limit_s, silent)

    def _look_at_limits(self) -> None:
        """Replace whoever has done enough."""
        if self._settings.worker_limits.memory_bytes and not self._blind:
            self._blind = self._cannot_look()
        for number, worker in tuple(self._workers.items()):
            ready_at = worker.record.ready_at
            if ready_at is None or worker.record.told_to_go:
                continue
            counts = worker.home.counts(worker.record.slot)
            reason = worker_limits.exceeded(
                self._settings.worker_limits,
                f"{self._settings.secret}-{number}",
                age_s=time.monotonic() - ready_at,
                pid=worker.process.pid,
                accepted=counts.accepted if counts is not None else None,
            )
            if reason is not None:
                self._post(ReplaceRequested(number, reason))
        self._loop.call_after("limits", worker_limits.EVERY_S, self._look_at_limits)

    def _cannot_look(self) -> bool:
        """Say it where the memory of a worker is hidden from us, as by hidepid of proc(5)."""
        for number, worker in self._workers.items():
            process = worker.process
            if worker_limits.resident_bytes(process.pid) is None and not process.has_ended():
                self._log.write(
                    "warning",
                    "cannot-look",
                    worker=number,
                    error=f"/proc/{process.pid} is not there or closed to us",
                    hint="--max-memory replaces nobody whose memory is not known",
                )
                return True
        return False

    def _start(self, number: int, slot: int, generation: int, home: Home) -> _Worker:
        """Start the process with all it needs; nothing is left of it when that raises."""
        program = home.program
        with ExitStack() as theirs, ExitStack() as ours:
            notify = self._notify_socket(number)
            ours.callback(notify.close)
            mark = self._output.mark()
            environment = {wire.ENV_NOTIFY: notify.address}
            if program.watchdog_s:
                environment["WATCHDOG_USEC"] = str(int(program.watchdog_s * 1_000_000))
            free = (fd for fd in count(FIRST_FD) if fd != program.ready_fd)
            line, tell_pid = None, ""
            if program.handoff == LISTENER:
                tell_pid = "LISTEN_PID"
                environment |= told_to(generation=generation, slot=slot, master_pid=os.getpid())
                if self._settings.control is not None:
                    path = self._settings.control.address.removeprefix("unix:")
                    environment["EINHORN_SOCK_PATH"] = path
                listeners = self._listeners(home.side)
                if not listeners.keys() >= (known(program) or set()):
                    why = "a listener was lost when the protector was killed; restart to have it"
                    raise OSError(errno.ENOTCONN, why)
                # They have the first numbers, and --ready fd:N none of these.
                descriptors = {next(free): listeners[i] for i in sorted(known(program) or ())}
            else:
                line, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.callback(line.close)
                theirs.callback(end.close)
                places = {
                    wire.ENV_CHANNEL: home.channel.read.fileno(),
                    wire.ENV_RETURN: end.fileno(),
                }
                board, offset = home.place(slot) or (-1, 0)
                if board >= 0:
                    places[wire.ENV_SCOREBOARD] = board
                descriptors = dict(zip(free, places.values(), strict=False))
                numbers = zip(places, descriptors, strict=True)
                environment |= {name: str(fd) for name, fd in numbers}
                if board >= 0:
                    environment[wire.ENV_SCOREBOARD] += f":{offset}"
                environment |= {
                    wire.ENV_LISTENERS: program.listeners,
                    wire.ENV_GENERATION: str(generation),
                    wire.ENV_WORKER: str(slot),
                    wire.ENV_WORKERS: str(max(self._settings.processes, slot + 1)),
                }
            with (
                Readiness.offered(program, free) as (readiness, offer),
                self._output.opened(number, generation) as output,
            ):
                descriptors |= offer.places | output.places
                process = spawn(program, environment | offer.environment, descriptors, tell_pid)
                output.pid = process.pid
            ours.pop_all()
        # What others write is nobody's last words.
        for each in reversed(self._workers.values()):
            if each.record.mark < 0:
                break  # so have all before it
            self._note(each, mark=-1)
        mark = -1 if self._workers else mark
        record = WorkerRecord(
            number, generation, process.pid, mark, slot=slot, started_at=clock.date()
        )
        return _Worker(record, home, process, notify, line, readiness)

    def _heard(self, number: int) -> None:
        """Handle what a worker has said on its notify socket.

        Each message is handled, and what follows from it written down, before it is taken.
        """
        worker = self._workers[number]
        for _ in range(_HEARD_AT_ONCE):
            try:
                fields = worker.notify.hear(worker.process.pid)
                if fields is None:
                    return
                self._handle(number, worker, fields)
                worker.notify.take()
            except OSError as error:
                self._hear_later(number, worker, error)
                return

    def _handle(self, number: int, worker: _Worker, fields: Mapping[str, str]) -> None:
        if fields.get("READY") == "1" and worker.readiness.by_word:
            self._is_ready(number, "notify", retires=fields.get(_RETIRES[0]) == _RETIRES[1])
        usec = fields.get("EXTEND_TIMEOUT_USEC", "")
        # isdigit() alone is true of digits that int() does not take.
        if usec.isascii() and usec.isdigit() and len(usec) <= _USEC_DIGITS:
            self._post(TimeExtended(number, int(usec) / 1_000_000))
        if "STATUS" in fields:
            status = fields["STATUS"][:_STATUS_CHARACTERS]
            self._note(worker, status=status)
            self._log.write("debug", "status", worker=number, status=status)
        if fields.get("WATCHDOG") == "1":
            if not worker.record.watched:
                self._note(worker, watched=True)
            self._wait_for_word(number, worker)

    def _hear_later(self, number: int, worker: _Worker, error: OSError) -> None:
        """Out of memory: what waits stays readable, so only a timer keeps us from spinning."""
        self._log.write("error", "cannot-hear", worker=number, error=error.strerror)
        self._loop.unwatch(worker.notify.fileno())
        self._loop.call_after(("hear", number), _HEAR_AGAIN_S, lambda: self._hear_again(number))

    def _hear_again(self, number: int) -> None:
        worker = self._workers[number]
        try:
            self._loop.watch(worker.notify.fileno(), lambda: self._heard(number))
        except OSError as error:
            self._hear_later(number, worker, error)

    def _is_ready(self, number: int, by: str, *, retires: bool = False) -> None:
        worker = self._workers.get(number)
        if worker is None or worker.record.ready_at is not None:
            return
        self._note(worker, ready_at=time.monotonic(), ready_by=by)
        self.spoken_with = self.spoken_with or by != "timer"
        worker.readiness.is_known()
        if worker.process.has_ended():
            worker.died_saying_so = True  # nobody should rely on a dead one: its exit comes next
            return
        other = by if by != "notify" else None
        self._log.write(
            "info", "worker-ready", generation=worker.record.generation, worker=number, by=other
        )
        self._wait_for_word(number, worker)
        self._post(WorkerReady(number, retires or worker.accepts))

    def _ended(self, number: int) -> None:
        """Take in a worker's end, after what it had still said and, if it failed, its last words.

        Until these have come it is not reaped: so a program that replaces this one finds it ended,
        and asks again.
        """
        self._heard(number)
        worker = self._workers[number]
        unproven = worker.record.ready_at is None or worker.died_saying_so
        if unproven and worker.last_words is None:
            if not worker.asked and worker.process.has_ended():
                worker.asked = True
                self._loop.unwatch(worker.process.pidfd)
                self._output.last_words(
                    number, worker.record.mark, lambda said: self._said(number, said)
                )
            return
        try:
            result = worker.process.reap()
        except ChildProcessError:
            result = self._status_from_elsewhere(number, worker)
        if result is None:
            if worker.process.has_ended() and not worker.status_due:
                self._reap_later(number, worker)
            return
        how = result.how
        known = worker.record
        lost = worker.home.bury(known.slot)
        del self._workers[number], self._records[number]
        if self._by_pid.get(known.pid) == number:  # else it was another's meanwhile
            del self._by_pid[known.pid]
        for name in worker.named:
            del self.descriptors[name]
        self._loop.unwatch(worker.process.pidfd)
        orphans = self._keep_group(known, worker.process, worker.home)
        self._loop.unwatch(worker.notify.fileno())
        self._loop.cancel(("hear", number))
        self._loop.cancel(("word", number))
        worker.close()
        self._log.write(
            "info",
            "exited",
            generation=known.generation,
            worker=number,
            how=how,
            lost=lost or None,
        )
        if known.ready_at is None:
            self._orphans.end(worker.notify.address)
        detached = result.clean and known.ready_at is None
        reason, served_s = how, 0.0
        last = worker.last_words or ""
        if not known.told_to_go and not (result.clean and worker.home.ended):
            self._crashed(_crash(number, worker, result, lost, last))
            if not unproven:  # it has served, so its place is filled without waiting for them
                self._output.last_words(number, known.mark, lambda said: self._late(number, said))
        if unproven:
            reason = self._why(worker, how, last, detached=detached)
        else:
            served_s = time.monotonic() - (known.ready_at or 0.0)
        waiting = worker.home.channel.depth()
        self._post(WorkerExited(number, reason, served_s, waiting, detached, orphans))

    def _reap_later(self, number: int, worker: _Worker) -> None:
        """Somebody else is to see its end first: a debugger, or strace, that stands still."""
        self._loop.unwatch(worker.process.pidfd)
        self._loop.call_after(("reap", number), _REAP_AGAIN_S, lambda: self._ended(number))

    def _said(self, number: int, said: str) -> None:
        """Go on with the end of a worker whose last words were waited for."""
        self._workers[number].last_words = said
        self._ended(number)

    def _status_from_elsewhere(self, number: int, worker: _Worker) -> End | None:
        """Return how a worker ended that another process has reaped; None: not told yet."""
        told = self._statuses.pop(worker.process.pid, None)
        if told is not None or worker.status_due or not self._guarded:
            self._loop.cancel(("status", number))
            return End(*(told or (False, "ended, nobody knows how")))
        worker.status_due = True
        self._loop.unwatch(worker.process.pidfd)
        self._loop.call_after(("status", number), _STATUS_S, lambda: self._ended(number))
        return None

    def _why(self, worker: _Worker, how: str, last: str, *, detached: bool) -> str:
        """Say why a worker that never served has ended, as far as can be known."""
        when = "as soon as it was ready" if worker.died_saying_so else "before it was ready"
        program = worker.home.program
        reason = f"{program.argv[0]} {how} {when}"
        if detached:
            reason += "; does it detach itself? tell it to stay in the foreground"
            if program.handoff == CONNECTION:
                reason += f"; {known_servers.STDIN}"
        where = "" if last else self._output.where_to_look()
        advice = known_servers.advice(program, said=last, unseen=bool(where) and not detached)
        if advice and not self.spoken_with:
            reason += f"; {advice}"
        if last:
            return f"{reason}{LAST_WORDS}\n{last}"
        return "; ".join(filter(None, (reason, where)))


def _crash(number: int, worker: _Worker, end: End, lost: int | None, last_words: str) -> Crash:
    when = "draining" if worker.home.ended else "serving" if worker.record.ready_at else "starting"
    return Crash(
        at=clock.date(),
        generation=worker.record.generation,
        worker=number,
        slot=worker.record.slot,
        pid=worker.record.pid,
        how=end.how,
        when=when,
        lost=lost,
        last_words=last_words,
        cpu_s=end.cpu_s,
        max_rss_kib=end.max_rss_kib,
    )


_RETIRES = wire.RETIRES_ON_RETURN.split("=")


def what_failed(error: Exception) -> str:
    """Say an error's cause and the file it is about."""
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return f"{error.strerror}: raise the hard limit (ulimit -Hn, LimitNOFILE= of a unit)"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
