"""The lines of the table about a program for each connection: ours beside those known for it.

All run side by side with the same program, `head -n1`, and are loaded in turn.  One that is not
there is installed where that is possible, and otherwise left out, which is said on stderr and
below the table.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.figures import Figure, Scale, alternately, ratio
from bench.processes import (
    ROOT,
    START_LIMIT_S,
    CannotMeasure,
    Started,
    descendants,
    free_port,
    generate,
    resident_kib,
)
from bench.rows import Seen, column, middle_of, nothing_failed

#: Answers a line and ends.
PROGRAM = ("head", "-n1")
PLACES = 8
_OURS = "SocketProtector"


class Answering(Started):
    """A process that starts PROGRAM for each connection."""

    def _wait_until_it_answers(self) -> None:
        deadline_s = time.monotonic() + START_LIMIT_S
        while generate(self.address, "-c", "1", "-n", "1", "-T", "2")["failed"]:
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                said = self.said()
                self.close()
                raise CannotMeasure(f"{self.address} never answered: {said}")
            time.sleep(0.05)


def ours() -> list[str]:
    """The protector's options and COMMAND; by hand where it has no --handoff."""
    program = str(Path(sysconfig.get_path("scripts")) / "SocketProtector")
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    if "--handoff" in told:
        handoff = ["--handoff", "stdio", "--workers", str(PLACES)]
        return [program, "-f", *handoff, "ADDRESS", "--", *PROGRAM]
    pools = str(min(os.cpu_count() or 1, PLACES))
    pool = [sys.executable, "-I", "-m", "socketprotector.programs.stdio", "--at-once", str(PLACES)]
    worker = [*pool, "--of", pools, "--", *PROGRAM]
    return [program, "-f", "--workers", pools, "ADDRESS", "--", *worker]


def socat(_: Path) -> list[str]:
    """Without a process of its own between client and program (nofork), its fastest way."""
    listens = f"TCP-LISTEN:PORT,bind=HOST,reuseaddr,fork,max-children={PLACES},backlog=128"
    return [found("socat"), listens, f"EXEC:{' '.join(PROGRAM)},nofork"]


def tcpserver(_: Path) -> list[str]:
    """Without names and ident, as it is usually started."""
    return [found("tcpserver"), "-HRDl0", "-c", str(PLACES), "HOST", "PORT", *PROGRAM]


def xinetd(folder: Path) -> list[str]:
    """Without a limit: at its limit it refuses clients instead of letting them wait."""
    path, *arguments = PROGRAM
    lines = (
        "defaults\n{\n instances = UNLIMITED\n per_source = UNLIMITED\n cps = 1000000 1\n}\n"
        "service answering\n{\n type = UNLISTED\n socket_type = stream\n protocol = tcp\n"
        " wait = no\n flags = NOLIBWRAP\n bind = HOST\n port = PORT\n"
        f" user = {me()}\n server = {shutil.which(path)}\n"
        f" server_args = {' '.join(arguments)}\n}}\n"
    )
    (folder / "xinetd.conf").write_text(lines)
    given = ["-f", str(folder / "xinetd.conf"), "-pidfile", str(folder / "xinetd.pid")]
    return [found("xinetd"), "-dontfork", *given]


def openbsd_inetd(folder: Path) -> list[str]:
    """Without a limit, which it does not have; its package cannot be beside that of xinetd."""
    program = folder / "usr" / "sbin" / "inetd"
    quiet = {"cwd": folder, "check": True, "capture_output": True}
    try:
        subprocess.run(["apt-get", "download", "openbsd-inetd"], **quiet)  # type: ignore[call-overload]
        for package in folder.glob("openbsd-inetd*.deb"):
            subprocess.run(["dpkg", "-x", package, folder], **quiet)  # type: ignore[call-overload]
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotMeasure(f"cannot get it: {error}") from error
    path, *_ = PROGRAM
    command = f"{shutil.which(path)} {' '.join(PROGRAM)}"
    line = f"HOST:PORT stream tcp nowait {me()} {command}\n"
    (folder / "inetd.conf").write_text(line)
    return [found(str(program)), "-i", "-R", "100000000", "-q", "128", str(folder / "inetd.conf")]


def systemd_socket_activate(_: Path) -> list[str]:
    """Without a limit, which it does not have."""
    return [found("systemd-socket-activate"), "-l", "HOST:PORT", "--accept", "--inetd", *PROGRAM]


OTHERS: dict[str, Callable[[Path], list[str]]] = {
    "socat": socat,
    "tcpserver": tcpserver,
    "xinetd": xinetd,
    "openbsd-inetd": openbsd_inetd,
    "systemd-socket-activate": systemd_socket_activate,
}
#: tcpserver's name at Debian is another.
_PACKAGES = ("socat", "ucspi-tcp", "xinetd", "systemd")


def found(program: str) -> str:
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    if path is None:
        raise CannotMeasure("not installed")
    return path


def me() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def started(command: list[str], folder: Path) -> Answering:
    """Start a command in which HOST, PORT and ADDRESS stand for those of a free port."""
    host, port = "127.0.0.1", str(free_port())
    address = f"{host}:{port}"

    def filled(text: str) -> str:
        return text.replace("ADDRESS", address).replace("HOST", host).replace("PORT", port)

    for file in folder.glob("*.conf"):
        file.write_text(filled(file.read_text()))
    return Answering([filled(word) for word in command], address, {}, [])


def stdio(scale: Scale) -> list[Figure]:
    """Connections/s and p50 of a program for each connection, against the best of the others."""
    notes = []
    for package in _PACKAGES:  # one by one: what is not there must not keep the rest out
        subprocess.run([ROOT / "tools" / "install-packages", package], capture_output=True)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = {_OURS: stack.enter_context(started(ours(), root))}
        for name, command_of in OTHERS.items():
            (folder := root / name).mkdir()
            try:
                running[name] = stack.enter_context(started(command_of(folder), folder))
            except CannotMeasure as error:
                notes.append(f"{name} LEFT OUT: {str(error).strip().splitlines()[0]}")
                print(f"\n*** {notes[-1]}", file=sys.stderr)
        if len(running) == 1:
            raise CannotMeasure("none of the others could be started")
        figures = [
            figure
            for at_once in (PLACES, 1)
            for figure in compared(scale, running, at_once)
        ]  # fmt: skip
        kib = [resident_kib(pid) for pid in descendants(running[_OURS].pid)]
    figures[0].notes.extend(notes)
    figures[0].notes.append("a pool's VmRSS: " + ", ".join(f"{each / 1024:.1f} MB" for each in kib))
    return figures


def compared(scale: Scale, running: dict[str, Answering], at_once: int) -> list[Figure]:
    """Return two lines: of rates and of medians."""

    def loaded(one: Answering) -> Callable[[], Seen]:
        options = ("-c", str(at_once), "-t", str(scale(2, 0.3)), "--plain")
        return lambda: generate(one.address, *options)

    takers = [loaded(one) for one in running.values()]
    runs = dict(zip(running, alternately(scale.rounds(9), *takers), strict=True))
    nothing_failed(runs[_OURS])
    notes, fair = [], []
    for name, seen in runs.items():
        failed = sum(int(each["failed"]) for each in seen)
        if name != _OURS and not failed:
            fair.append(name)
        faster, rates = ratio(column(runs[_OURS], "per_second"), column(seen, "per_second"))
        slower, times = ratio(column(runs[_OURS], "p50_us"), column(seen, "p50_us"))
        notes.append(
            f"{name}: {middle_of(seen, 'per_second'):,.0f}/s, p50 "
            f"{middle_of(seen, 'p50_us'):,.0f} us, p99 {middle_of(seen, 'p99_us'):,.0f} us"
            + (f"; ours / this: rate {rates}, p50 {times}" if name != _OURS else "")
            + (f"; {failed} connections FAILED, so no rival" if failed else "")
        )
    if not fair:
        raise CannotMeasure("connections failed with every one of the others")
    most = max(fair, key=lambda name: middle_of(runs[name], "per_second"))
    soonest = min(fair, key=lambda name: middle_of(runs[name], "p50_us"))
    faster, rates = ratio(column(runs[_OURS], "per_second"), column(runs[most], "per_second"))
    slower, times = ratio(column(runs[_OURS], "p50_us"), column(runs[soonest], "p50_us"))
    what = f"a program for each connection ({' '.join(PROGRAM)}), C={at_once}"
    return [
        Figure(f"{what}: rate / that of {most}", rates, ">= 1.00", "", faster >= 1, notes),
        Figure(f"{what}: p50 / that of {soonest}", times, "<= 1.00", "", slower <= 1),
    ]
