"""`--guard`: a tiny parent that keeps the protector's descriptors, and restarts a killed protector.

The guard replaces systemd's file descriptor store on hosts without systemd.  It takes the same
messages (sd_notify(3): FDSTORE, FDSTOREREMOVE, FDNAME), over a socket pair.  The pid file names the
guard, and the guard passes signals on.  The guard adopts and reaps a killed protector's children.

The guard is executed by its path, on built-in modules alone (`socket` and `signal` cost 2 MB):

    python -I -S guard.py [--json] [--pid-file=FILE] COMMAND...

Its descriptors are those that system/inherited.py names.
"""

from __future__ import annotations

import _signal as signal
import _socket as socket
import os
import select
import stat
import sys
import time

if not __package__:  # executed by its path: then sys.path lacks this package
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
# Only modules that import little themselves; a test enforces that.
from socketprotector.model import log_format
from socketprotector.model.backoff import backoff_s
from socketprotector.model.errors import NO_PROCESSES
from socketprotector.system import inherited, pid_file_removal, signals
from socketprotector.system.terminal import is_journal, put_at_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

NAME = "SocketProtector"
#: The pid file's path.  /proc has it, too, but is not mounted everywhere.
PID_FILE_OPTION = "--pid-file="
#: The pipe to the relay, if log lines go to syslog.
RELAY = f"{inherited.RELAY}write"
#: The longest wait before the next protector starts, less the time that the last protector served.
LAST_WAIT_S = 10.0
#: The guard's exit status if the protector cannot be started at all (errors.SystemRefused).
FAILED = 111
#: How many recent exits of workers are sent again to the next protector, and for how long: the
#: killed protector may not have read them.  A buffer of BUFFER_BYTES has room for 278 exits.
LAST_STATUSES, SENT_AGAIN_S, BUFFER_BYTES = 512, 10.0, 106_496
#: Sockets that may have files, by the beginnings of their names.
WITH_FILES = (inherited.LISTENER, inherited.SIBLING, inherited.RESERVED)
#: How long the guard waits before it looks again, if the kernel has no memory to wait for events.
SHORTAGE_S = 0.1
_MESSAGE_BYTES = 4096
#: How much a writable pipe takes without blocking (PIPE_BUF).
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

        json: log lines are JSON.  pid_file_path: the pid file, whose lock is in the store.
        """
        self.command = command
        self.json = json
        self.pid_file_path = pid_file_path
        self.store = store
        self.line: socket.socket | None = None
        self.pid = 0  # of the protector, 0 while none runs
        self.accepted_at: float | None = None  # when this protector sent READY=1
        self.first = True  # this protector is the first
        self.verdict: int | None = None  # the exit status that the protector has announced
        self.finish = 0  # the signal that makes workers finish; 0: they need no signal
        self.deaths = 0  # crashes in a row, each soon after its start
        self.due: float | None = None  # when to start the next protector
        #: Signals that no protector has confirmed; True: a stop signal that this one has taken.
        self.untaken: dict[int, bool] = {}
        self.stopping = False  # a protector has confirmed a stop
        self.began = False  # this protector handles signals
        self.failure = ""  # why this protector cannot resume
        self.statuses: list[tuple[float, bytes]] = []  # exits of workers: when, and the message
        self.sent = 0  # how many of these were sent to this protector
        self.dropped = 0  # log lines that could not be written

    # -- the protector ---------------------------------------------------------

    def start(self) -> None:
        """Start a protector with all descriptors in the store."""
        self.due = None
        self.accepted_at, self.began, self.failure = None, False, ""
        theirs = None
        # Block signals until the protector has its handlers: an earlier signal must kill nothing.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
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
        self.untaken = dict.fromkeys(self.untaken, False)
        for number in self.untaken:
            os.kill(self.pid, number)
        # The previous protector may not have read recent messages.
        recent = time.monotonic() - SENT_AGAIN_S
        sent, unsent = self.statuses[: self.sent], self.statuses[self.sent :]
        self.statuses = [*(each for each in sent if each[0] > recent), *unsent]
        self.sent = 0
        self.send_statuses()

    def start_later(self, event: str, served_s: float = 0.0, **why: str | float) -> None:
        """Start the next protector after a wait, which grows with each crash in a row.

        served_s: how long the last protector served; subtracted from the wait.
        """
        wait_s = max(0.0, min(backoff_s(self.deaths), LAST_WAIT_S) - served_s)
        if self.deaths > 1:
            why["in_a_row"] = self.deaths
        if self.failure:
            why["error"] = self.failure
        self.log(event, **why, again_in_s=round(wait_s, 2) or 0)
        self.due = time.monotonic() + wait_s

    def _become(self, descriptors: dict[str, int]) -> None:
        """Execute the protector in this child process; never return."""
        self.close_line()  # the guard's end: names() may need a descriptor
        try:
            # The descriptors keep their numbers: moving them would need as many free numbers.
            with inherited.kept_through_exec(descriptors) as variables:
                os.execve(self.command[0], self.command, {**os.environ, **variables})
        except OSError as error:
            self.log("guard-cannot-execute", file=self.command[0], error=str(error))
        finally:
            os._exit(FAILED)

    def close_line(self) -> None:
        """Close the line to the protector, if there is one."""
        if self.line is not None:
            self.line.close()
            self.line = None

    def ended(self, status: int) -> None:
        """Handle the protector's exit: if it was announced, exit too; otherwise restart it."""
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
        if not self.began:
            self.sent = 0  # this protector has read none
        served_s = 0.0
        if self.accepted_at is not None:
            served_s = time.monotonic() - self.accepted_at
            # KILL has an outside cause, so the next protector need not wait.
            if served_s >= LAST_WAIT_S or code == -signal.SIGKILL:
                self.deaths = 0
        self.start_later("protector-died", served_s, protector=how)

    def give_up_if_pointless(self, how: str, status: int) -> None:
        """Exit if another protector would be useless after this one failed.

        how: how this protector failed.  status: the guard's exit status then.
        """
        # Only after the first protector: later, workers may be running and serving.
        if self.first and self.accepted_at is None:
            self.give_up(f"{how} before it accepted a connection", status)
        stops = self.stopping or any(number in signals.STOPS for number in self.untaken)
        if stops and not self.began:
            # Workers finish when our exit closes the last end of their channel; workers that accept
            # get a signal.
            self.give_up(f"{how} before it could stop", status)

    # -- messages of the protector -----------------------------------------------

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
                continue  # the protector exited without reading all; its messages are still here
            except OSError as error:
                self.log("guard-cannot-read", error=str(error.strerror))
                return  # out of memory: the next poll() tries again
            if not data:
                self.close_line()
                return
            fds = [int.from_bytes(content[:4], sys.byteorder) for _, _, content in control]
            self.take(pairs(data), fds[0] if fds else -1)
            if flags & socket.MSG_CTRUNC:
                self.log("guard-cannot-keep", error="out of descriptors")

    def take(self, said: dict[str, str], fd: int) -> None:
        """Handle one message of the protector.  Takes ownership of its descriptor."""
        self.began = self.began or "X_BEGAN" in said or "X_TOOK" in said
        self.failure = said.get("X_FAILED", self.failure)
        self.stopping = self.stopping or "STOPPING" in said
        took = int(said.get("X_TOOK", "0"))
        if took in self.untaken:
            self.untaken[took] = True
        # A stop signal counts as confirmed only once a stop has also begun.
        self.untaken = {
            number: taken
            for number, taken in self.untaken.items()
            if not taken or (number in signals.STOPS and not self.stopping)
        }
        name = said.get("FDNAME", "")
        if "FDSTORE" in said and fd >= 0 and name:
            self.forget(name)
            self.store[name] = fd
        elif fd >= 0:
            if "X_OUTPUT" in said:  # the log file was reopened; the next protector inherits it
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
        """Order the workers to finish, remove the pid file and sockets' files, and exit."""
        for name in (inherited.SETTINGS, inherited.STATE):
            self.forget(name)  # a log line to a pipe takes two descriptors; none may be free
        error = {"error": self.failure} if self.failure else {}
        self.log("guard-gives-up", protector=why, **error)
        for name, fd in self.store.items():
            if self.finish and name.startswith(inherited.WORKER) and name.endswith(".process"):
                try:
                    signal.pidfd_send_signal(fd, self.finish)
                except OSError:
                    pass  # the worker has exited, or has changed its user
        if inherited.PID_FILE in self.store:
            pid_file_removal.remove(self.pid_file_path, self.store[inherited.PID_FILE])
        self.remove_files()
        sys.exit(status)

    def remove_files(self) -> None:
        """Remove the files of listening sockets, and the folder of notify sockets."""
        for name in [*self.store]:
            if name == inherited.CONTROL or name.startswith(WITH_FILES):
                with_path = socket.socket(fileno=self.store.pop(name))
                path = with_path.getsockname() if with_path.family == socket.AF_UNIX else ""
                with_path.close()
                if isinstance(path, str) and path:
                    remove_if_stale(path)
        if inherited.NOTIFY in self.store:
            try:
                from socketprotector.system.sd_notify import remove_folder

                remove_folder(os.readlink(f"/proc/self/fd/{self.store[inherited.NOTIFY]}"))
            except Exception:
                pass  # no /proc, no descriptor, or other files are installed by now

    def log(self, event: str, **fields: str | float) -> None:
        """Write a line to the protector's log, in the same form.

        A line that would block is dropped; the next one has the number of dropped lines.
        """
        if self.dropped:
            fields["dropped_lines"] = self.dropped
        now = time.time()
        prioritized = RELAY in self.store or is_journal()  # the reader adds the time
        if self.json:
            line = log_format.as_json("warning", event, fields, now, prioritized=prioritized)
        else:
            line = log_format.as_text("warning", event, fields, None if prioritized else now)
        try:
            write(self.store.get(RELAY, 2), line.encode("utf-8", "backslashreplace"))
        except OSError:
            self.dropped += 1
        else:
            self.dropped = 0

    # -- signals and children --------------------------------------------------

    def signalled(self, number: int) -> None:
        """Pass a signal on; if this protector does not confirm it, the next one also gets it."""
        if number == signal.SIGCHLD:
            self.reap()
            return
        if number in signals.STOPS:
            self.deaths = 0  # so that a stop does not wait long for the next protector
        if self.pid:
            os.kill(self.pid, number)
        else:
            self.due = time.monotonic()
        # The protector may be dead, or die before it handles the signal.
        self.untaken[number] = False

    def reap(self) -> None:
        """Reap every exited child, and report the exits of adopted workers to the protector."""
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
        """Send as many exits of workers as the line has room for: the protector may be behind."""
        while self.sent < len(self.statuses) and self.line is not None:
            _, text = self.statuses[self.sent]
            try:
                self.line.send(text, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                break  # no room; or the protector has exited, and the next one gets them
            self.sent += 1
        excess = max(0, self.sent - LAST_STATUSES)
        del self.statuses[:excess]
        self.sent -= excess

    def run(self) -> None:
        """Run protectors until one announces its exit; then raise SystemExit with that status."""
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
            try:
                ready = [fd for fd, _ in poll.poll(wait_ms)]
            except OSError:  # no memory: do not exit, or no process restarts a killed protector
                time.sleep(SHORTAGE_S)
                continue
            self.hear()
            self.send_statuses()
            if receive in ready:
                for number in dict.fromkeys(os.read(receive, 512)):
                    self.signalled(number)
            if self.due is not None and time.monotonic() >= self.due:
                self.start()


def write(fd: int, line: bytes) -> None:
    """Write a line without waiting for a reader.  Raises OSError if the write would block.

    system/log.py instead opens its own file description, but that may be denied here.
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
    """Remove the files of a socket on which no process listens.  path: the bound address."""
    try:
        # Imported only at the exit, to save memory; the import fails if descriptors have run out.
        from socketprotector.system.dir_lock import locked
        from socketprotector.system.socket_file import files_of, is_stale

        with locked(path):
            for each in files_of(path):
                if is_stale(each):
                    os.unlink(each)
    except Exception:
        pass  # a process listens there, the folder is not this user's, or other files are installed


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
        pass  # no /proc: this process keeps the name of the interpreter
    try:
        Guard(command, store, json=json, pid_file_path=path).run()
    finally:
        signals.block()  # a later signal could still change the exit status


if __name__ == "__main__":
    main()
