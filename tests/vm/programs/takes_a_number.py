"""Kills a group that is gone, whose number another group has by now; says what became of that.

Words: `adopted` if another process reaps the leader; `before` to be on Linux before 6.9, where a
pidfd does not lead to a group; `unasked` to kill without asking whether the number is another's.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable

from socketprotector.system.process import Process

#: A namespace of its own, in which a number can be chosen.
APART = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def run(*words: str, path: Iterable[str] = ()) -> str:
    """Return what became of the other group; path: where modules are.  Raises AssertionError."""
    command = [*APART, sys.executable, __file__, *words]
    environment = {**os.environ, "PYTHONPATH": ":".join(path)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _leader() -> int:
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.write(send, b"+")
        signal.pause()
    os.read(receive, 1)
    return pid


def _main(words: list[str]) -> None:
    if "before" in words:
        real = signal.pidfd_send_signal

        def before(fd: int, number: int, siginfo: None = None, flags: int = 0) -> None:
            if flags:
                raise OSError(22, "Invalid argument")
            real(fd, number)

        signal.pidfd_send_signal = before
    if "unasked" in words:
        Process._is_anothers_number = lambda self: False  # type: ignore[method-assign]
    first = Process(_leader())
    os.kill(first.pid, signal.SIGKILL)
    if "adopted" in words:
        os.waitpid(first.pid, 0)
    else:
        while first.reap() is None:
            pass
    with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as file:
        file.write(str(first.pid - 1))
    second = _leader()
    assert second == first.pid, (second, first.pid)
    if "unasked" not in words:
        assert not first.has_group()
        assert not first.signal_group(signal.SIGKILL)
    first.kill_group()
    os.kill(second, signal.SIGTERM)  # which SIGKILL, if it was sent, comes before
    _, status = os.waitpid(second, 0)
    print("lived" if os.WTERMSIG(status) == signal.SIGTERM else "was killed")


if __name__ == "__main__":
    _main(sys.argv[1:])
