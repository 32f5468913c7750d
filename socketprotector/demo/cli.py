"""The command line of the demo, which ends its processes and removes its files.

Every error is one line: what failed, where, and how to fix it.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import click

from ..model.duration import Duration
from ..model.errors import Refusal, SystemRefused, what_failed
from ..model.text import escape, in_one_line, in_units
from ..system import control_path
from ..system.answer import Answering
from .protected import Protected, free_name, lay_out
from .screen import Screen
from .story import NotAsPromised, Story

NAME = "SocketProtector demo"
FAILED, INTERRUPTED = 1, 130
#: With fewer descriptors, fewer clients connect than the demo announces.
_DESCRIPTORS = 128
_LOG_LINES = 20
#: The most bytes in the parent's path: the control socket's path may have 107 (unix(7)).
_DEEPEST = 107 - len("/socketprotector-demo-12345678/socketprotector/demo-1234567.control")
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: An example of --help, in lines that can be copied from a terminal of 80 columns.
YOUR_TURN = """\
Now your server: SocketProtector -f --handoff listener --ready notify 8000 \\
  -- gunicorn --preload app:app"""


class _Command(Answering, click.Command):
    """The demo's command."""


@click.command(
    cls=_Command,
    context_settings={"help_option_names": ["-h", "-?", "--help"], "show_default": True},
    # Not as a docstring, which `python -OO` drops.
    help="""Show in 20 seconds what SocketProtector does.

    A small server runs behind it, and clients connect all the time.  The demo deploys a release,
    then a broken one; it kills a worker, then SocketProtector.  It counts failed connections.

    The demo needs no root and chooses its ports, and leaves nothing behind.

    Exit status: 0: no connection failed; 1: some failed, or a step had an unexpected
    result; 111: this machine lacks something, and the message says what; 130: interrupted.
    """,
)
@click.option("--pause", default="3s", type=Duration(), help="How long each step is shown.")
def command(pause: float) -> int:
    return _run(pause)


class _Stops:
    """Turns INT, TERM and HUP into KeyboardInterrupt, at once, or after `release`.

    A signal mask is not used, because started programs would inherit it.
    """

    def __init__(self) -> None:
        self._held = self._came = False
        for number in _STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores HUP
                signal.signal(number, self._stop)

    def _stop(self, _: int, __: FrameType | None) -> None:
        self._came = True
        if not self._held:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """From now on, only record signals."""
        self._held = True

    def release(self) -> None:
        """Let signals interrupt again.  Raises KeyboardInterrupt if one has come meanwhile."""
        self._held = False
        if self._came:
            raise KeyboardInterrupt


def _run(pause_s: float) -> int:
    """Show the demo; return its exit status.  Raises Refusal."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= descriptors < _DESCRIPTORS:
        raise SystemRefused(
            f"a limit of {descriptors} open files is too low; run: ulimit -n {_DESCRIPTORS}"
        )
    stops, screen = _Stops(), Screen()
    protected, name = None, free_name()
    # As root, the protector makes this folder for its notify sockets, because other users cannot
    # enter the demo's own folder.
    kept = os.path.lexists(control_path.SYSTEM)
    stops.hold()
    try:
        folder = Path(tempfile.mkdtemp(prefix="socketprotector-demo-", dir=_place()))
    except OSError as error:
        raise SystemRefused(f"cannot make a folder: {error}; set TMPDIR to another") from error
    try:
        lay_out(folder)
        protected = Protected(folder, name)
        stops.release()
        with screen.running():
            good = Story(screen, protected, pause_s).tell()
        screen.say(YOUR_TURN if good else _log(protected))
        return 0 if good else FAILED
    except KeyboardInterrupt:
        screen.say("interrupted: ending all started programs")
        return INTERRUPTED
    except NotAsPromised as error:
        screen.say(f"Not as promised: {error}", "bold red")
        assert protected is not None
        screen.say(_log(protected))
        return FAILED
    except OSError as error:
        raise SystemRefused(what_failed(error)) from error
    finally:
        stops.hold()
        try:
            if protected is not None:
                protected.end()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if not kept:
                with suppress(OSError):  # another protector uses it, or no protector made it
                    os.rmdir(control_path.SYSTEM)


def _place() -> str:
    """Return the parent of the demo's folder: the usual one, if it is short enough for a socket."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= _DEEPEST else "/tmp"


def _log(protected: Protected) -> str:
    """Return the end of the protector's log, for people."""
    lines = "\n".join(f"  {escape(line)}" for line in protected.said(_LOG_LINES))
    return f"The end of SocketProtector's log:\n{lines}"


def main(arguments: Sequence[str]) -> int:
    """Show the demo, or its help or version; return the exit status."""
    try:
        return int(command.main(arguments, prog_name=NAME, standalone_mode=False) or 0)
    except click.ClickException as error:
        message = in_one_line(error.format_message())
        return _refused(f"{message}; see {NAME} --help", error.exit_code)
    except Refusal as error:
        return _refused(str(error), error.status)
    except subprocess.TimeoutExpired as error:
        limit = in_units(error.timeout)
        return _refused(f"a program of the demo has not ended within {limit}", FAILED)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED


def _refused(why: str, status: int) -> int:
    with suppress(OSError):  # stderr's reader has exited
        print(f"{NAME}: {escape(why)}", file=sys.stderr)
    return status
