"""Which process runs as which user: from /proc/PID/status, through all that can happen."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import needs
from tests.namespaces import may
from tests.procfs import children_of, running, status_of
from tests.running import COMMAND, ask, eventually, wait_gone
from tests.scenarios.operating import Line
from tests.scenarios.starting import told
from tests.scenarios.tools import Release
from tests.scenarios.users import A, B, Command
from tests.unanswered import Unanswered

pytestmark = needs.ANOTHER_USER

KEPT = 1 << 5 | 1 << 6 | 1 << 7  # CAP_KILL, CAP_SETGID, CAP_SETUID
ALL = int(status_of(os.getpid())["CapBnd"], 16)


class Rights:
    """What the kernel says that a process is."""

    def __init__(self, pid: int) -> None:
        fields = status_of(pid)
        self.uids = {int(word) for word in fields["Uid"].split()}
        self.gids = {int(word) for word in fields["Gid"].split()}
        self.groups = {int(word) for word in fields["Groups"].split()}
        names = ("CapPrm", "CapEff", "CapInh", "CapAmb")
        self.permitted, self.effective, self.inheritable, self.ambient = (
            int(fields[name], 16) for name in names
        )
        self.bounding = int(fields["CapBnd"], 16)
        self.no_new_privileges = fields["NoNewPrivs"] == "1"

    def belongs_to(self, user: str) -> None:
        """Check that all its users and groups are this user's."""
        entry = pwd.getpwnam(user)
        assert self.uids == {entry.pw_uid}
        assert self.gids == {entry.pw_gid}
        if entry.pw_uid:
            assert self.groups == set(os.getgrouplist(user, entry.pw_gid))

    def is_powerless(self) -> None:
        assert (self.permitted, self.effective, self.inheritable, self.ambient) == (0, 0, 0, 0)

    def starts_others(self) -> None:
        """Check that it can become another user and kill, and nothing else."""
        assert (self.permitted, self.effective, self.bounding) == (KEPT, KEPT, KEPT)


def is_user(pid: int, user: str) -> None:
    rights = Rights(pid)
    rights.belongs_to(user)
    rights.is_powerless()


def keeps_three(pid: int, *, lends: bool = False) -> None:
    """A protector (or a guard, which lends to each of its protectors) with --worker-user."""
    rights = Rights(pid)
    rights.belongs_to(A)
    rights.starts_others()
    wanted = KEPT if lends else 0
    assert (rights.inheritable, rights.ambient) == (wanted, wanted)


USERS = pytest.mark.parametrize(
    "options",
    [
        (),
        ("--user", A),
        ("--user", A, "--worker-user", B),
        ("--user", A, "--worker-user", B, "--no-new-privs"),
    ],
    ids=["root", "user", "worker-user", "no-new-privs"],
)
MODES = pytest.mark.parametrize("guarded", [False, True], ids=["alone", "guarded"])


def check(command: Command, options: tuple[str, ...], *, guarded: bool) -> None:
    """Check every process there is: all are what the options say."""
    main, protector, worker = command.guard, command.protector, command.worker_pid()
    assert (main != protector) is guarded
    if "--worker-user" in options:
        keeps_three(protector)
        keeps_three(main, lends=guarded)
        is_user(worker, B)
    elif options:
        for pid in (main, protector, worker):
            is_user(pid, A)
    else:
        for pid in (main, protector, worker):
            rights = Rights(pid)
            rights.belongs_to("root")
            assert rights.permitted == rights.effective == rights.bounding == ALL
    for pid in (main, protector, worker):
        assert Rights(pid).no_new_privileges is ("--no-new-privs" in options)


@MODES
@USERS
def test_every_process_is_what_was_asked_for_and_stays_so(
    command: Command, options: tuple[str, ...], guarded: bool
) -> None:
    """After the start, a reload, an upgrade in place, and a SIGKILL under the guard."""
    guard = ("--guard",) if guarded else ()
    command.up(*options, *guard, "--umask", "022", "unix:s", "--", *command.worker("talks"))
    check(command, options, guarded=guarded)

    command.start.reload()
    check(command, options, guarded=guarded)

    command.start.send(signal.SIGUSR2)
    command.start.wait_for("event=resumed")
    command.start.reload()
    check(command, options, guarded=guarded)

    if guarded:
        before = command.protector
        os.kill(before, signal.SIGKILL)
        assert not wait_gone([before])
        eventually(lambda: command.start.log.count("event=resumed") == 2, "another protector")
        command.start.reload()
        check(command, options, guarded=guarded)
    assert ask(command.address) == "hello"
    command.start.stop()
    assert command.start.left() == []


@pytest.mark.costly
def test_the_relay_has_no_capability(command: Command) -> None:
    """It reads what workers say; one that took it over would have gained nothing."""
    words = ("--umask", "022", "unix:s", "--", *command.worker("talks"))
    command.up("--user", A, "--worker-user", B, *words, relay=True)
    relays = running("log_relay.py", children_of(command.start.pid))

    assert len(relays) == 1
    is_user(relays[0], A)
    keeps_three(command.start.pid)
    command.start.stop()


ASKS = """
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(30)
    client.connect(sys.argv[1])
    client.sendall(b'{"v": 1, "command": "release"}\\n')
    print(client.recv(4096).decode())
"""


def test_the_protectors_user_is_heard_on_the_control_socket_and_a_workers_is_not(
    command: Command,
) -> None:
    control = str(command.start.folder / "control")
    words = ("--umask", "022", "--control", control, "unix:s", "--", *command.worker("talks"))
    command.up("--user", A, "--worker-user", B, *words)

    def answer(user: str) -> str:
        asks = [command.python, "-c", ASKS, control]
        done = subprocess.run(asks, user=user, group=65534, cwd="/", capture_output=True, text=True)
        return done.stdout + done.stderr

    assert '"ok":true' in answer(A)
    assert "Permission denied" in answer(B)
    command.start.stop()
    assert command.start.left() == []


@MODES
def test_workers_of_another_user_are_ready_replaced_ended_and_reaped(
    command: Command, guarded: bool
) -> None:
    options = ("--user", A, "--worker-user", B, "--kill-timeout", "0", "--stop-timeout", "0")
    guard = ("--guard",) if guarded else ()
    words = command.worker("ignores_sigterm")
    command.up(*options, *guard, "--umask", "022", "unix:s", "--", *words)
    first = command.worker_pid()
    os.kill(first, signal.SIGKILL)
    assert not wait_gone([first])
    eventually(lambda: command.start.log.count("event=worker-ready") == 2, "its replacement")
    second = command.worker_pid()
    assert second != first

    command.start.stop()  # TERM is ignored: only KILL ends it

    assert "signal=KILL" in command.start.log
    assert "cannot-signal" not in command.start.log
    assert not wait_gone([second])
    assert command.start.left() == []


def test_a_worker_of_another_user_gets_what_every_worker_gets(command: Command) -> None:
    """Descriptors, session, signals, limits, directory: the same, though it starts otherwise."""
    words = ("--umask", "027", "--limit", "nofile=512", "unix:s?mode=0666", "--")
    ignored = set()
    for users in (("--user", A), ("--user", A, "--worker-user", B)):
        command.up(*users, *words, *command.worker("tells"))
        found = told(command.address)
        command.start.stop()

        assert set(found["descriptors"]) == {"0", "1", "2", "3", "4", "5"}
        assert found["descriptors"]["0"] == "/dev/null"
        assert found["session"] == found["group"] == found["pid"]
        assert int(found["blocked"], 16) == 0
        assert (found["umask"], found["nofile"][0]) == (0o027, 512)
        assert found["directory"] == str(command.start.folder)
        # Signals 32 and 33 are the C library's own: its posix_spawn() has them ignored.
        ignored.add(int(found["ignored"], 16) & ~(3 << 31))
    assert len(ignored) == 1


@MODES
@pytest.mark.costly
def test_what_a_failed_worker_of_another_user_leaves_is_ended(
    command: Command, guarded: bool
) -> None:
    """Its environment is closed to the protector; so a process of that user looks."""
    guard = ("--guard",) if guarded else ()
    once = ("--start-tries", "1", "--kill-timeout", "0.1s")
    words = ("unix:s", "--", *command.worker("detaches_itself"))

    ended = command.run("--user", A, "--worker-user", B, *guard, *once, *words)

    assert ended.status == 3
    assert "event=left-behind" in command.start.log
    assert command.start.left() == []


@pytest.mark.costly
def test_another_user_can_hold_the_clients_of_addresses_that_root_has_bound(
    command: Command,
) -> None:
    """Only sockets of one user share an address, and under a guard all else runs as that user."""
    control = command.start.folder / "control"
    words = (
        "--handoff",
        "listener",
        "--control",
        control,
        "127.0.0.1:0",
        "127.0.0.1:0?defer_accept=1",
    )
    command.up("--user", A, "--guard", *words, "--", *command.worker("accepts"))
    with Line(control) as line, ExitStack() as clients:
        there = [each["address"].rpartition(":")[2] for each in line.status()["listeners"]]
        line.ask("hold", seconds=3600)
        found = [clients.enter_context(Unanswered(("127.0.0.1", int(port)))) for port in there]
        for each in found:
            each.tries_again()
        line.ask("release")
        for each in found:
            each.connects()
            each.say("hello")
            assert each.hear().endswith(" hello")
    command.start.stop()


def test_root_cannot_be_had_back(command: Command) -> None:
    command.up("--user", A, "unix:s", "--", *command.worker("tries_to_be_root"))

    assert ask(command.address) == "setuid no setgid no setgroups no"
    command.start.stop()


@pytest.mark.parametrize("options", [(), ("--no-new-privs",), ("--limit", "nice=1")])
def test_a_worker_of_another_user_cannot_become_root(
    command: Command, options: tuple[str, ...]
) -> None:
    words = ("--user", A, "--worker-user", B, *options, "--umask", "022", "unix:s", "--")
    command.up(*words, *command.worker("tries_to_be_root"))

    assert ask(command.address) == "setuid no setgid no setgroups no"
    if "--limit" in options:
        assert os.getpriority(os.PRIO_PROCESS, command.worker_pid()) == 1
        assert os.getpriority(os.PRIO_PROCESS, command.start.pid) == 0
    command.start.stop()


@pytest.mark.costly
def test_no_new_privileges_makes_a_set_user_id_program_gain_nothing(command: Command) -> None:
    """It is a choice: without it such a program is what it always was."""
    tool = command.start.folder / "tool"
    shutil.copy("/usr/bin/id", tool)
    tool.chmod(0o4755)
    script = f'{tool} -u >&2; exec "$@"'
    wrapped = ("/bin/sh", "-c", script, "sh", *command.worker("talks"))
    if os.statvfs(tool).f_flag & os.ST_NOSUID:
        needs.skip("a file system that honours set-user-id")

    said = []
    for extra in ((), ("--no-new-privs",)):
        command.start.log_file.unlink(missing_ok=True)
        command.up("--user", A, *extra, "unix:s", "--", *wrapped)
        command.start.stop()  # and the relay has written all that it had
        said.append(re.findall(r"^\d+$", command.start.log, re.MULTILINE))

    assert said == [["0"], [str(pwd.getpwnam(A).pw_uid)]]


def test_nothing_of_the_workers_environment_runs_with_the_right_to_become_any_user(
    command: Command,
) -> None:
    """A loader that follows LD_PRELOAD of an env file that the worker may write."""
    gate = command.start.folder / "preload.so"
    gate.write_text("no library\n")
    gate.chmod(0o644)
    file = command.start.folder / "worker.env"
    file.write_text(f"LD_PRELOAD={gate}\n")
    words = ("--user", A, "--worker-user", B, "--env-file", str(file), "--umask", "022")

    command.up(*words, "unix:s", "--", *command.worker("talks"))
    command.start.stop()  # and the relay has written all that it had

    # The loader complains once for each program that it was told to load it into.
    complaints = re.findall(f"object '{gate}' from LD_PRELOAD", command.start.log)
    assert len(complaints) == 1, "the worker's own, which has no privilege"


def test_a_command_that_only_the_protectors_user_may_execute_is_refused_in_words(
    command: Command,
) -> None:
    private = command.start.folder / "private.sh"
    private.write_text("#!/bin/sh\n")
    private.chmod(0o700)
    os.chown(private, pwd.getpwnam(A).pw_uid, -1)
    words = ("--start-tries", "1", "unix:s", "--", str(private))

    ended = command.run("--user", A, "--worker-user", B, *words)

    assert ended.status == 111
    assert f"--worker-user {B} cannot execute {private}: {private} is closed to that" in ended.err
    assert command.start.left() == []


@pytest.mark.parametrize("what", ["Python", "package"])
@pytest.mark.parametrize("guard", ["--guard", ""])
def test_a_python_that_the_protectors_user_cannot_execute_is_refused_in_words(
    command: Command, guard: str, what: str
) -> None:
    """As one below /root: the protector is executed as its user."""
    closed = command.start.folder / "closed.sh"
    closed.mkdir(mode=0o700)
    python = closed / "python"
    python.symlink_to(command.python)
    package = closed / "socketprotector"
    if what == "package":
        shutil.copytree(Path(command.path.split(":")[0]) / "socketprotector", package)
    words = (*filter(None, (guard,)), "--no-log-relay", "--user", A, "unix:s", "--")
    log: tuple[str | Path, ...] = ("--log-file", command.start.log_file)

    ended = command.start(
        *(*log, *words, *command.worker("minimal")),
        command=(str(python if what == "Python" else command.python), *COMMAND[1:]),
        environment={"PYTHONPATH": f"{closed}:{command.path}"},
    )

    named = f"execute {python}" if what == "Python" else f"enter {package}/"
    assert f"--user {A} cannot {named}: the folder {closed} is closed" in ended.err
    assert ended.status == 111
    assert command.start.left() == []


def test_the_protector_can_do_nothing_but_its_three_things(command: Command) -> None:
    """Files of root's and of the workers' are closed to it."""
    command.up(
        *("--user", A, "--worker-user", B, "--umask", "022"),
        *("unix:s", "--", *command.worker("talks")),
    )
    held = Rights(command.start.pid)

    assert held.permitted == KEPT, "neither DAC_OVERRIDE, CHOWN, SYS_PTRACE nor SYS_ADMIN"
    assert not may(A, "cat", f"/proc/{command.worker_pid()}/environ")
    assert not may(B, "cat", f"/proc/{command.start.pid}/environ")
    command.start.stop()


HARMS = ["shuts_it_down", "listens_again", "drops_clients_in_the_kernel", "steers_clients_astray"]


@pytest.mark.slow
@pytest.mark.parametrize("attack", HARMS)
@pytest.mark.costly
def test_a_worker_of_another_user_harms_by_its_listener_no_generation_after_it(
    command: Command, free_port: Callable[[], int], attack: str
) -> None:
    """tests/workers/hostile_listener.py; the protector could bind neither port nor socket anew."""
    port, release = free_port(), Release(command.start.folder / "daemon")
    release.becomes(*command.worker("hostile_listener", attack))
    mode = ("--handoff", "listener", "--ready", "notify", "--drain-timeout", "0.1s")
    quick = ("--kill-timeout", "0.1s", "--user", A, "--worker-user", B)
    command.up(*mode, *quick, f"127.0.0.1:{port}", "--", release.path)
    eventually(lambda: "\ndone\n" in command.start.log, "the attack")
    release.becomes(*command.worker("accepts"))

    for generation in range(2, 6):
        os.kill(command.guard, signal.SIGHUP)
        told = f"event=reloaded generation={generation}"
        eventually(lambda told=told: told in command.start.log, told)  # type: ignore[misc]
        gone = f"event=drained generation={generation - 1}"
        eventually(lambda gone=gone: gone in command.start.log, gone)  # type: ignore[misc]
        new = command.worker_pid()
        replies = {ask(("127.0.0.1", port), timeout_s=5) for _ in range(20)}
        assert replies == {f"[{new}] hello"}
    command.start.stop()
