"""A service's user against root: what this user leaves in systemd's descriptor store.

The unit is root's, with a user for the protector.  After a crash systemd starts the command as
root, with descriptors that the service's user could write.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.hostile import store
from tests.namespaces import any_users_python
from tests.own_folder import let_through
from tests.procfs import status_of
from tests.running import eventually
from tests.scenarios.managers import MANY, Service
from tests.scenarios.tools import spawned
from tests.scenarios.users import A, B

pytestmark = [needs.ANOTHER_USER, pytest.mark.timeout(120)]


@pytest.fixture
def service(tmp_path: Path, marked_environment: dict[str, str]) -> Iterator[Service]:
    _, path = any_users_python()
    let_through(tmp_path)
    made = Service(tmp_path, {**marked_environment, "PYTHONPATH": path}, ("--user", A))
    yield made
    made.close()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that writes which user it runs as; anyone can execute it."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, pwd.getpwnam(A).pw_uid, -1)
    theirs.chmod(0o777)
    made = theirs / "program"
    made.write_text(f"#!/bin/sh\nid -un >{theirs}/ran-as\nexec sleep 60\n")
    made.chmod(0o755)
    return made


def attack(service: Service, program: Path, *words: str) -> None:
    """Rewrite the protector's memfds as the service's user, and kill it."""
    python, path = any_users_python()
    user = pwd.getpwnam(A)
    service.main.signal(signal.SIGUSR2)  # an executed program may be read by its user
    service.main.log.wait_for("event=resumed")
    subprocess.run(
        [python, "-m", store.__name__, str(service.main.pid), str(program), json.dumps(words)],
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    service.kill()


def uid_of(pid: int) -> str:
    return pwd.getpwuid(int(status_of(pid)["Uid"].split()[0])).pw_name


def test_the_user_of_a_service_becomes_no_other_by_the_state(
    service: Service, program: Path
) -> None:
    words = ("127.0.0.1:0", "--", *MANY)
    service.start(*words).ready()
    service.wait_for("READY")
    [worker] = spawned(service.main)

    attack(service, program)
    resumed = service.start(*words)
    resumed.log.wait_for("event=resumed")
    os.kill(worker, signal.SIGKILL)

    ran_as = program.parent / "ran-as"
    eventually(lambda: ran_as.exists() and bool(ran_as.read_text()), "the program has run")
    assert ran_as.read_text() == f"{A}\n"
    assert uid_of(resumed.pid) == A


def test_no_reader_of_the_configuration_runs_as_root(service: Service, program: Path) -> None:
    """A reader names the unknown keys of a file, so it must not read a file of root."""
    words = ("127.0.0.1:0", "--", *MANY)
    service.start(*words).ready()
    service.wait_for("READY")
    secret = program.parent.parent / "secret"
    secret.write_text("hunter2 = 1\n")
    secret.chmod(0o600)

    attack(service, program, "--config", str(secret))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    service.store["sp.reader"] = theirs.detach()
    service.start(*words).process.wait(30)

    with ours:
        kind, [answer], _, _ = socket.recv_fds(ours, 4096, 1)
    reason = os.pread(answer, 4096, 0).decode()
    os.close(answer)
    assert kind == b"refused"
    assert "Permission denied" in reason
    assert "hunter2" not in reason


@pytest.mark.parametrize("later", [B, "root"])
def test_the_state_of_one_user_is_not_resumed_as_another(
    service: Service, program: Path, later: str
) -> None:
    words = ("127.0.0.1:0", "--", *MANY)
    service.start(*words).ready()
    service.wait_for("READY")

    attack(service, program)
    service.options = ("--user", later)
    refused = service.start(*words)

    assert refused.process.wait(30) == 1
    assert "another user has made the stored state" in refused.log.text()
    service.drop()  # as systemd does once it tries no more
    started = service.start(*words).ready()
    assert [uid_of(each) for each in spawned(started)] == [later]
    assert not (program.parent / "ran-as").exists()


def test_a_file_with_a_mistake_says_why_nothing_resumes_and_systemd_tries_again(
    service: Service, tmp_path: Path
) -> None:
    file = tmp_path / "web.toml"
    file.write_text(f'user = "{A}"\n')
    service.options = ("--config", str(file))
    words = ("127.0.0.1:0", "--", *MANY)
    service.start(*words).ready()
    service.wait_for("READY")
    [worker] = spawned(service.main)
    service.kill()

    file.write_text(f'user = "{A}\n')
    failed = service.start(*words)
    assert failed.process.wait(30) == 1
    assert "cannot resume: " in failed.log.text()
    assert f"{file} line 1: not TOML" in failed.log.text()
    # A mistake that concerns no right is no reason.
    file.write_text(f'user = "{A}"\nworkrs = 2\n')
    resumed = service.start(*words)
    resumed.log.wait_for("event=resumed")
    assert uid_of(resumed.pid) == A
    resumed.stop()
    eventually(lambda: not Path(f"/proc/{worker}").exists(), "the worker has finished")
