"""The main program of the resident process.

The launching process needs more memory than the resident process.  A fork would keep that memory,
so the launching process executes this program.  The program inherits descriptors, each with a name
(system/inherited.py):

- at the first start: from the launching process, or from the guard;
- after a crash: from systemd, or from the guard;
- at an upgrade: from the program that this program replaces.

If the descriptors include a state, the program resumes where its predecessor stopped.
tests/test_imports.py lists modules that the start must not load; bench/ measures the memory.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from .. import __version__
from ..core.snapshot import Snapshot
from ..model.errors import Refusal, SystemRefused, what_failed
from ..model.settings import ListenerSettings, Settings, SettingsError, load
from ..system import executable, inherited, late_modules, signals
from ..system.state_file import NewerStateError, StateError
from ..system.terminal import tell
from . import checkpoint
from .assembly import Resident
from .delivery.choice import delivery_for

#: Before an upgrade, a trial process loads the new program.  The new program's start needs this
#: much more memory than the trial.
_SPARE_BYTES = 4 * 1024 * 1024
#: How many characters of a reason the guard gets: its log lines have 4,096 bytes at most.
_LONGEST = 500


def main() -> None:
    """Run as the protector, or as the trial of an upgrade (upgrade.py).

    The protector runs until a stop has ended all generations.
    """
    command = executable.command_of(tuple(sys.argv[1:]))
    descriptors = inherited.receive()
    if inherited.PROBE in descriptors:
        sys.exit(_answer_as_trial(descriptors))
    status = run(descriptors, command)
    signals.block()
    sys.exit(status)


def _answer_as_trial(descriptors: dict[str, int]) -> int:
    """Send an answer to upgrade.py if this program can take over.  Returns the exit status."""
    try:
        settings, _ = _settings_and_listeners(
            descriptors, checkpoint.read(descriptors[inherited.STATE])
        )
        delivery_for(settings.mode)
        late_modules.load_all()  # to find a faulty module before the exec
        if inherited.CHECK in descriptors:
            from ..system import whole_package

            whole_package.load()
        # A start needs more memory than this trial.  After the exec there is no way back, so try
        # to get that memory now.
        bytearray(_SPARE_BYTES)
    except (StateError, SettingsError) as error:
        print(error, file=sys.stderr)
        return SystemRefused.status
    os.write(descriptors[inherited.PROBE], f"ok {__version__}\n".encode())
    return 0


def run(descriptors: dict[str, int], command: tuple[str, ...]) -> int:
    """Supervise with the inherited descriptors, and own them.  Returns the exit status.

    command: executes this program again.
    """
    os.chdir("/")  # not earlier: Python may have had to import modules from the caller's directory
    guard = descriptors.get(inherited.GUARD, -1)
    # Read the state only once, because the state of a thousand workers is large.
    earlier: Snapshot | StateError | None = None
    try:
        if inherited.STATE in descriptors:
            earlier = checkpoint.read(descriptors[inherited.STATE])
    except StateError as error:
        earlier = error
    try:
        snapshot = earlier if isinstance(earlier, Snapshot) else None
        settings, listeners = _settings_and_listeners(descriptors, snapshot)
    except SettingsError as error:
        _report(str(error), guard)
        return SystemRefused.status
    _name_process()
    resident = Resident(settings, listeners, descriptors, earlier, command)
    try:
        status = resident.supervise()
    except Exception as error:
        # After `stty tostop`, a background process that writes gets SIGTTOU, and stops.  Block this
        # signal, so that the traceback still reaches the terminal.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
        if resident.is_resumable and resident.parents.store.keeps:
            # The guard or systemd starts SocketProtector again, which resumes.  If only a newer
            # version can resume, it may be installed by then.
            is_shortage = resident.is_adopting and isinstance(error, OSError)
            if is_shortage or isinstance(error, NewerStateError):
                _report(f"cannot resume: {what_failed(error)}", guard)
                sys.exit(1)
            raise
        # No program will resume our work: finish() reports the failure, and removes our files.
        reason = str(error)
        if isinstance(error, OSError) and not resident.is_resumable:
            reason = f"cannot start: {what_failed(error)}"  # the system's fault, so no traceback
        elif isinstance(error, StateError):
            _report(f"cannot resume: {error}")
        elif not isinstance(error, Refusal):
            sys.excepthook(type(error), error, error.__traceback__)
        status = SystemRefused.status
        resident.fail(reason)
    resident.finish(status)
    return status


def _settings_and_listeners(
    descriptors: dict[str, int], snapshot: Snapshot | None
) -> tuple[Settings, Sequence[ListenerSettings]]:
    """Return the settings in force, and all listeners.  Raises SettingsError.

    During a reload, the listeners come from the reload's new settings (the candidate).  These
    settings still have the listeners that the reload removes, marked as removed.
    """
    if snapshot is not None:
        found = snapshot.settings
        return found.current, (found.candidate or found.current).listeners
    fd = descriptors[inherited.SETTINGS]
    settings = load(os.pread(fd, os.fstat(fd).st_size, 0))
    return settings, settings.listeners


def _report(why: str, guard: int = -1) -> None:
    """Send the guard the reason why we exit, for its log; without a guard, print the reason.

    guard: the descriptor of the line to the guard; -1: there is none.
    """
    try:
        os.write(guard, f"X_FAILED={why[:_LONGEST]}".encode("utf-8", "backslashreplace"))
    except OSError:
        tell(why)


def _name_process() -> None:
    """Name this process SocketProtector for ps, pgrep and pkill."""
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write("SocketProtector")
    except OSError:
        pass  # no /proc: the process keeps its old name, which does no harm


if __name__ == "__main__":
    main()
