"""Older kernels and filters of system calls: one clear line at the start, or it works without.

Each newer call is made to fail, one after the other, as a kernel without it (ENOSYS) and as an old
container's seccomp profile (EPERM) would have it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from socketprotector.launch.kernel_calls import OLDEST_KERNEL
from socketprotector.model.errors import SystemRefused
from tests import needs
from tests.rounds import rounds
from tests.running import ROOT, WORKERS
from tests.systems import elsewhere
from tests.systems.life import ELSEWHERE, Surroundings, lived, under_unit

pytestmark = needs.unless(elsewhere.known_machine(), f"call numbers of {os.uname().machine}")

#: Without these nothing would hold; as they are called in elsewhere.py, and by us.
REQUIRED = {
    "F_ADD_SEALS": "memfd_create",
    "memfd_create": "memfd_create",
    "pidfd_open": "pidfd_open",
    "pidfd_send_signal": "pidfd_send_signal",
    "P_PIDFD": r"waitid\(P_PIDFD\)",
}
#: glibc goes on without clone3 where that is unknown, not where it is forbidden.
FORBIDDEN = {**REQUIRED, "clone3": "posix_spawn"}
OPTIONAL = {
    "ENOSYS": sorted({*elsewhere.CALLS} - {*REQUIRED}),
    "EPERM": sorted({*elsewhere.CALLS} - {*FORBIDDEN}),
}
#: How many are missing alone, beside all of them at once.
ONE_BY_ONE = rounds(1, 100)
#: The first number of what came with Linux 3.17 or later, in the kernel's table for x86_64.
NEWER = 317


def through(error: str, *calls: str) -> tuple[str, ...]:
    return (*ELSEWHERE, *(f"--fails={call}={error}" for call in calls), "--")


@pytest.mark.parametrize("check", [(), ("--check",)], ids=["start", "check"])
@pytest.mark.parametrize("call", REQUIRED)
def test_a_missing_call_is_said_in_one_line_before_anything_is_bound(
    tmp_path: Path, marked_environment: dict[str, str], call: str, check: tuple[str, ...]
) -> None:
    around = Surroundings(tmp_path, marked_environment, through("ENOSYS", call))
    words = ("--pid-file", str(tmp_path / "pid"), f"unix:{tmp_path}/web", "--", "/bin/true")

    done = around.run(*check, *words)

    assert done.returncode == SystemRefused.status
    oldest = ".".join(map(str, OLDEST_KERNEL))
    release = re.escape(os.uname().release)
    assert re.fullmatch(
        rf"SocketProtector: {REQUIRED[call]}: missing; Linux {oldest} or later is needed, "
        rf"this is {release}( with a filter of system calls)?\n",
        done.stderr,
    )
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", [(), ("--check",)], ids=["start", "check"])
@pytest.mark.parametrize("call", FORBIDDEN)
def test_so_is_a_forbidden_one(
    tmp_path: Path, marked_environment: dict[str, str], call: str, check: tuple[str, ...]
) -> None:
    around = Surroundings(tmp_path, marked_environment, through("EPERM", call))

    done = around.run(*check, f"unix:{tmp_path}/web", "--", "/bin/true")

    assert done.returncode == SystemRefused.status
    said = rf"SocketProtector: {FORBIDDEN[call]}: forbidden by a filter of system calls; .*\n"
    assert re.fullmatch(said, done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.costly
@pytest.mark.parametrize("mode", ["connection", "listener"])
@pytest.mark.parametrize(("error", "calls"), OPTIONAL.items(), ids=str)
def test_without_any_other_newer_call_it_lives_a_whole_life(
    tmp_path: Path, marked_environment: dict[str, str], error: str, calls: list[str], mode: str
) -> None:
    lived(Surroundings(tmp_path, marked_environment, through(error, *calls), mode=mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["connection", "listener"])
@pytest.mark.parametrize(
    ("error", "call"),
    [(error, call) for error, calls in OPTIONAL.items() for call in calls][:ONE_BY_ONE],
)
@pytest.mark.costly
def test_without_one_of_them_too(
    tmp_path: Path, marked_environment: dict[str, str], error: str, call: str, mode: str
) -> None:
    lived(Surroundings(tmp_path, marked_environment, through(error, call), mode=mode))


@pytest.mark.costly
def test_no_newer_call_is_used_that_is_not_tested_here(
    tmp_path: Path, marked_environment: dict[str, str]
) -> None:
    table = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if shutil.which("strace") is None or not table.exists():
        needs.skip("strace, libc6-dev")
    numbers = re.findall(r"#define __NR_(\w+) (\d+)", table.read_text())
    newer = {name for name, number in numbers if int(number) >= NEWER}
    used: set[str] = set()
    for mode in ("connection", "listener"):
        # The filter in the kernel, so that only these calls stop for the tracer.
        those = "trace=" + ",".join(f"?{name}" for name in sorted(newer))
        tracer = ("strace", "-D", "-ff", "--seccomp-bpf", "-e", those, "-qq")
        through = (*tracer, "-o", str(tmp_path / "calls"))
        lived(Surroundings(tmp_path, marked_environment, through, mode=mode))
        for calls in tmp_path.glob("calls.*"):  # one of each process
            used |= set(re.findall(r"^(\w+)\(", calls.read_text(), re.MULTILINE))

    assert "pidfd_open" in used
    assert used & newer <= {*elsewhere.CALLS}


@pytest.mark.parametrize(
    ("mode", "daemon", "options"),
    [
        ("connection", (sys.executable, str(WORKERS / "echo.py")), ()),  # on the client library
        ("listener", (), ()),
        # The probes have a helper process.  What answers is no TLS.
        ("stdio", ("/bin/cat",), ("--health", "https:/", "--health-every", "100ms")),
    ],
)
def test_a_whole_life_needs_no_call_that_the_units_forbid(
    tmp_path: Path,
    marked_environment: dict[str, str],
    mode: str,
    daemon: tuple[str, ...],
    options: tuple[str, ...],
) -> None:
    """Such a call kills its process by SIGSYS.  Which call it was says strace."""
    checks = ("--settle", "100ms", "--settle-check", "true")
    around = Surroundings(
        tmp_path,
        marked_environment,
        under_unit(ROOT / "init.d" / "socketprotector.service"),
        mode=mode,
        daemon=daemon,
        options=("--log-prefix", *checks, *options),
        orders=("hold --for 1s", "release", "reload --canary 50% --for 200ms", "upgrade"),
    )

    log = lived(around)

    assert not log.count("SIGSYS|signal 31")
    assert bool(log.count("event=unhealthy .*no TLS")) is bool(options)
