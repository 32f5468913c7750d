"""`--guard`: a tiny parent that keeps the protector's descriptors and starts it again.

It plays systemd's file descriptor store for everyone without systemd: the same messages
(sd_notify(3): FDSTORE, FDSTOREREMOVE, FDNAME), over a socket pair.  It is the pid file's
process, passes signals on, and adopts and reaps what the protector leaves when it is killed.

Executed by its path, on built-in modules alone (`socket` and `signal` would cost 2 MB):

    python -I -S guard.py [--json] [--pid-file=FILE] COMMAND...

with the descriptors that system/inherited.py names.
"""

from __future__ import annotations

import _signal as signal
import _socket as socket
import os
import select
import stat
import sys
import time

if not __package__:  # executed by its path: the package that it is in is not on the path then
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
# Modules that import little themselves: a test holds it.
from socketprotector.model import log_format
from socketprotector.model.backoff import backoff_s
from socketprotector.model.errors import NO_PROCESSES
from socketprotector.system import inherited, pid_file_removal, signals
from socketprotector.system.terminal import put_at_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

NAME = "SocketProtector"
#: Where the pid file is: /proc, which could tell, is not mounted everywhere.
PID_FILE_OPTION = "--pid-file="
#: The way to syslog, where that is where lines go.
RELAY = f"{inherited.RELAY}write"
#: No client of a protector waits longer for the next one; what it has served for counts.
LAST_WAIT_S = 10.0
#: Its exit status when the protector cannot be started at all (errors.SystemRefused).
FAILED = 111
#: How workers ended is sent to the next protector, too, where the one before may not have read it.
LAST_STATUSES = 255
SENT_AGAIN_S = 10.0
#: Sockets that may have files, by the beginnings of their names.
WITH_FILES = (inherited.LISTENER, inherited.SIBLING, inherited.RESERVED)
_MESSAGE_BYTES = 4096
#: What a descriptor that is ready to be written to takes without blocking (PIPE_BUF).
_LINE_BYTES = 4096
_NO_SIGNALS: tuple[int, ...] = ()


class Guard:
    """Keeps descriptors by name, and one protector running."""

    def __init__(
        self,
        command: list[str],
        store: dict[str, int],
        *,
        json: bool = False,
        pid_file_path: str = "",
    ) -> None:
        """Take ownership of the descriptors in the store.

        json: the form of log lines.  pid_file_path: where the one is whose lock is in the store.
        """
        self.command = command
        self.json = json
        self.pid_file_path = pid_file_path
        self.store = store
        self.line: socket.socket | None = None
        self.pid = 0  # of the protector, 0 while none runs
        self.accepted_at: float | None = None  # when this protector said READY
        self.first = True  # this protector is
        self.verdict: int | None = None  # the exit status it said it will have
        self.finish = 0  # the signal that has workers that accept finish
        self.deaths = 0  # in a row, of protectors that died by themselves and soon
        self.due: float | None = None  # when to start the next one
        self.untaken: list[int] = []  # signals that no protector has said it took
        self.stopping = False  # a stop was taken
        self.began = False  # it has said anything: it has gone on, and takes signals
        self.statuses: list[tuple[float, bytes]] = []  # how workers ended, and when that was known
        self.sent = 0  # of these to this protector: it may be behind
        self.dropped = 0  # lines that could not be written

    # -- the protector ---------------------------------------------------------

    def start(self) -> None:
        """Start a protector with all that is in the store."""
        self.due = None
        self.accepted_at, self.began = None, False
        theirs = None
        # Blocked until its handlers stand: a signal in between waits, it does not kill.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.pid = os.fork()
            if self.pid == 0:
                self._become({**self.store, inherited.GUARD: theirs.fileno()})
        except OSError as error:  # no more descriptors, or processes
            self.close_line()
            why = NO_PROCESSES if isinstance(error, BlockingIOError) else str(error.strerror)
            self.give_up_if_pointless(f"cannot be started ({why})", FAILED)
            self.deaths += 1
            self.start_later("guard-cannot-start", error=why)
            return
        finally:
            if theirs is not None:
                theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, _NO_SIGNALS)
        for number in self.untaken:
            os.kill(self.pid, number)
        # What was sent to the one before may not have been read.
        recent = time.monotonic() - SENT_AGAIN_S
        sent, unsent = self.statuses[: self.sent], self.statuses[self.sent :]
        self.statuses = [*(each for each in sent if each[0] > recent), *unsent]
        self.sent = 0
        self.send_statuses()

    def start_later(self, event: str, served_s: float = 0.0, **why: str | float) -> None:
        """Start the next one: later each time in a row, less what the last one has served."""
        wait_s = max(0.0, min(backoff_s(self.deaths), LAST_WAIT_S) - served_s)
        if self.deaths > 1:
            why["in_a_row"] = self.deaths
        self.log(event, **why, again_in_s=round(wait_s, 2) or 0)
        self.due = time.monotonic() + wait_s

    def _become(self, descriptors: dict[str, int]) -> None:
        """Be the protector; never returns."""
        try:
            # Where they are: to move them takes as many again, and there may not be as many.
            with inherited.kept_through_exec(descriptors) as variables:
                os.execve(self.command[0], self.command, {**os.environ, **variables})
        except OSError as error:
            self.log("guard-cannot-execute", file=self.command[0], error=str(error))
        finally:
            os._exit(FAILED)

    def close_line(self) -> None:
        """Let go of the protector's line, if there is one."""
        if self.line is not None:
            self.line.close()
            self.line = None

    def ended(self, status: int) -> None:
        """Handle the protector's exit: for good if it said so, else start it again."""
        self.hear()
        self.pid = 0
        self.close_line()
        if self.verdict is not None:
            sys.exit(self.verdict)
        code = os.waitstatus_to_exitcode(status)
        how = f"killed by signal {-code}" if code < 0 else f"exited with status {code}"
        if code >= 0:
            self.give_up_if_pointless(how, code or FAILED)
        self.first = False
        self.deaths += 1
        served_s = 0.0
        if self.accepted_at is not None:
            served_s = time.monotonic() - self.accepted_at
            # KILL comes from without, and says nothing of the next one.
            if served_s >= LAST_WAIT_S or code == -signal.SIGKILL:
                self.deaths = 0
        self.start_later("protector-died", served_s, protector=how)

    def give_up_if_pointless(self, how: str, status: int) -> None:
        """Give up if no other protector is to follow the one that could not begin or go on.

        how: what became of that one.  status: the guard's exit status then.
        """
        # Of the first only: after it something may be served, by workers that live on.
        if self.first and self.accepted_at is None:
            self.give_up(f"{how} before it ever accepted", status)
        stops = self.stopping or any(number in signals.STOPS for number in self.untaken)
        if stops and not self.began:
            # Workers finish what they have when the last end of their channel is closed; those
            # that accept get a signal.
            self.give_up(f"{how} when it was to stop", status)

    # -- what it says ----------------------------------------------------------

    def hear(self) -> None:
        """Handle all messages that wait on the line."""
        while self.line is not None:
            try:
                data, control, flags, _ = self.line.recvmsg(
                    _MESSAGE_BYTES,
                    socket.CMSG_LEN(4),  # CMSG_SPACE of one int has room for two
                    socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
                )
            except BlockingIOError:
                return  # nothing more for now
            except ConnectionResetError:
                continue  # it is gone and had not read all; what it said is still here
            except OSError as error:
                self.log("guard-cannot-read", error=str(error.strerror))
                return  # out of memory for the moment
            if not data:
                self.close_line()
                return
            fds = [int.from_bytes(content[:4], sys.byteorder) for _, _, content in control]
            self.take(pairs(data), fds[0] if fds else -1)
            if flags & socket.MSG_CTRUNC:
                self.log("guard-cannot-keep", error="out of descriptors")

    def take(self, said: dict[str, str], fd: int) -> None:
        """Do what one message asks for.  Takes ownership of its descriptor."""
        self.began = True
        self.stopping = self.stopping or "STOPPING" in said
        took = int(said.get("X_TOOK", "0"))
        self.untaken = [
            number
            for number in self.untaken
            if (not self.stopping if number in signals.STOPS else number != took)
        ]
        name = said.get("FDNAME", "")
        if "FDSTORE" in said and fd >= 0 and name:
            self.forget(name)
            self.store[name] = fd
        elif fd >= 0:
            if "X_OUTPUT" in said:  # the log file was opened anew; the next protector inherits it
                os.dup2(fd, 1)
                os.dup2(fd, 2)
            os.close(fd)
        if "FDSTOREREMOVE" in said:
            self.forget(name)
        if said.get("READY") == "1" and self.accepted_at is None:
            self.accepted_at = time.monotonic()
        if "X_FINISH" in said:
            self.finish = int(said["X_FINISH"])
        if "EXIT_STATUS" in said:
            self.verdict = int(said["EXIT_STATUS"])

    def forget(self, name: str) -> None:
        """Close the descriptor of this name, if it is kept."""
        if name in self.store:
            os.close(self.store.pop(name))

    def give_up(self, why: str, status: int) -> NoReturn:
        """Leave nothing behind that says we are here, have workers finish, and exit."""
        for name in (inherited.SETTINGS, inherited.STATE):
            self.forget(name)  # a line to a pipe takes two descriptors, and there may be none left
        self.log("guard-gives-up", protector=why)
        for name, fd in self.store.items():
            if self.finish and name.startswith(inherited.WORKER) and name.endswith(".process"):
                try:
                    signal.pidfd_send_signal(fd, self.finish)
                except OSError:
                    pass  # it has ended, or has become another user's
        if inherited.PID_FILE in self.store:
            pid_file_removal.remove(self.pid_file_path, self.store[inherited.PID_FILE])
        self.remove_files()
        sys.exit(status)

    def remove_files(self) -> None:
        """Remove the files of listening sockets, and the folder of notify sockets, if unused."""
        for name in [*self.store]:
            if name == inherited.CONTROL or name.startswith(WITH_FILES):
                with_path = socket.socket(fileno=self.store.pop(name))
                path = with_path.getsockname() if with_path.family == socket.AF_UNIX else ""
                with_path.close()
                if isinstance(path, str) and path:
                    remove_if_stale(path)
        if inherited.NOTIFY in self.store:
            try:
                os.rmdir(os.readlink(f"/proc/self/fd/{self.store[inherited.NOTIFY]}"))
            except OSError:
                pass  # workers live on, or there is no /proc

    def log(self, event: str, **fields: str | float) -> None:
        """Write a line as the protector writes its own, to where that goes: maybe to its relay.

        One that would block is dropped, and the next one says how many were.
        """
        if self.dropped:
            fields["dropped_lines"] = self.dropped
        formed = log_format.as_json if self.json else log_format.as_text
        line = formed("warning", event, fields, time.time())
        try:
            write(self.store.get(RELAY, 2), line.encode("utf-8", "backslashreplace"))
        except OSError:
            self.dropped += 1
        else:
            self.dropped = 0

    # -- signals and children --------------------------------------------------

    def signalled(self, number: int) -> None:
        """Pass a signal on; unless this protector says that it took it, it is for the next one."""
        if number == signal.SIGCHLD:
            self.reap()
            return
        if number in signals.STOPS:
            self.deaths = 0  # whatever they were of: a stop is not to wait for the next one
        if self.pid:
            os.kill(self.pid, number)
        else:
            self.due = time.monotonic()
        # It may be dead, or die before it gets to that: then it is for the next one.
        took_a_stop = self.pid and self.stopping and number in signals.STOPS
        if number not in self.untaken and not took_a_stop:
            self.untaken.append(number)

    def reap(self) -> None:
        """Reap every child that has ended; the protector is told of those it left to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.ended(status)
            else:
                self.statuses.append((time.monotonic(), b"X_EXITED=%d %d" % (pid, status)))
                self.send_statuses()

    def send_statuses(self) -> None:
        """Send the protector as many as there is room for: it may be suspended, or behind."""
        while self.sent < len(self.statuses) and self.line is not None:
            _, text = self.statuses[self.sent]
            try:
                self.line.send(text, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                break  # no room; or it is gone, and they are for the next one
            self.sent += 1
        over = max(0, self.sent - LAST_STATUSES)
        del self.statuses[:over]
        self.sent -= over

    def run(self) -> None:
        """Serve until the protector has ended for good; leaves by SystemExit.

        After that a signal may still change the exit status: see signals.block().
        """
        try:
            receive = signals.catch((*signals.TO_THE_PROTECTOR, signal.SIGCHLD))
        except OSError as error:
            self.give_up(f"cannot be guarded ({error.strerror})", FAILED)
        self.start()
        while True:
            poll = select.poll()
            poll.register(receive, select.POLLIN)
            if self.line is not None:
                behind = self.sent < len(self.statuses)
                events = select.POLLIN | (select.POLLOUT if behind else 0)
                poll.register(self.line.fileno(), events)
            wait_ms = None
            if self.due is not None:
                wait_ms = max(0.0, self.due - time.monotonic()) * 1000
            ready = [fd for fd, _ in poll.poll(wait_ms)]
            self.hear()
            self.send_statuses()
            if receive in ready:
                for number in dict.fromkeys(os.read(receive, 512)):
                    self.signalled(number)
            if self.due is not None and time.monotonic() >= self.due:
                self.start()


def write(fd: int, line: bytes) -> None:
    """Write a line without ever waiting for a reader.  Raises OSError if it would have to.

    A description of our own, as system/log.py has, cannot be opened where it is another user's.
    """
    line = line[: _LINE_BYTES - 1].rstrip(b"\n") + b"\n"
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        put_at_once(fd, line)
        return
    theirs = socket.socket(fileno=os.dup(fd))
    try:
        theirs.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    finally:
        theirs.close()


def remove_if_stale(path: str) -> None:
    """Remove the files of a socket on which no process listens.  path: what it is bound as."""
    try:
        # Only at the end: it costs memory.  It fails where descriptors have run out.
        from socketprotector.system.dir_lock import locked
        from socketprotector.system.socket_file import files_of

        with locked(path):
            for each in files_of(path):
                if not stat.S_ISSOCK(os.lstat(each).st_mode):
                    continue
                probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                try:
                    probe.connect(each)
                except ConnectionRefusedError:
                    os.unlink(each)
                finally:
                    probe.close()
    except (OSError, ImportError):
        pass  # a process listens there, or the folder is not this user's


def pairs(data: bytes) -> dict[str, str]:
    """Return the NAME=VALUE lines of a message."""
    lines = (line.partition("=") for line in data.decode("utf-8", "replace").split("\n"))
    return {name: value for name, found, value in lines if found}


def main() -> None:
    command = sys.argv[1:]
    json = command[:1] == ["--json"]
    if json:
        command = command[1:]
    path = ""
    if command and command[0].startswith(PID_FILE_OPTION):
        path = command.pop(0).removeprefix(PID_FILE_OPTION)
    store = inherited.receive()
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write(NAME)
    except OSError:
        pass  # no /proc: the name is a courtesy
    try:
        Guard(command, store, json=json, pid_file_path=path).run()
    finally:
        signals.block()


if __name__ == "__main__":
    main()
