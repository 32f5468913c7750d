"""A release is asked before it gets its first client: --ready accept and http:, and the probe."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.load import Load
from tests.procfs import ports_of
from tests.running import (
    DEADLINE_S,
    FAIR_START_S,
    Protector,
    ask,
    eventually,
    shared_path,
    wait_gone,
)
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.scenarios.faults import injected
from tests.scenarios.operating import Operating
from tests.scenarios.probed import Asked, get, probers
from tests.scenarios.tools import EITHER_HANDOFF, NOBODY, Gate, Release, spawned, worker

Starter = Callable[..., Protector]
SHORT = ("--start-timeout", f"{FAIR_START_S}s")
GONE = '500, "database gone"'


def reload_failed(daemon: Protector) -> str:
    """Reload, and wait until that has failed; return the line that says so."""
    mark = daemon.signal(signal.SIGHUP)
    line = daemon.log.wait_for(r"event=(reloaded|reload-failed)\b", after=mark)
    assert "event=reload-failed" in line
    return line


# -- the default of --handoff listener -----------------------------------------------


def accepting(protector: Starter, release: Release, *options: str, **env: str) -> Protector:
    """One whose release says nothing, and is ready once it accepts."""
    words = ("--handoff", "listener", *options, "127.0.0.1:0", "--", release.path)
    return protector(*words, **env).ready()


def test_a_server_that_says_nothing_is_ready_once_it_accepts(
    protector: Starter, release: Release, gate: Gate
) -> None:
    silent = worker("accepts", "--ready", "never")
    release.becomes(*silent)
    daemon = accepting(protector, release)
    daemon.log.wait_for("event=worker-ready generation=1 worker=1 by=accept")

    with Load(f"127.0.0.1:{daemon.port}", concurrency=4) as load:
        release.becomes(*gate.before(*silent))
        mark = daemon.signal(signal.SIGHUP)
        [new] = spawned(daemon, 2)
        load.wait_for(lambda now: now.connections > 50)
        assert not any("event=route" in line for line in daemon.log.seen[mark:])
        gate.open()
        daemon.log.wait_for("event=worker-ready generation=2 worker=2 by=accept", after=mark)
        daemon.log.wait_for("event=reloaded generation=2", after=mark)
        load.wait_for(lambda now: new in now.pids)
    assert not load.snapshot().failures
    daemon.stop()


@pytest.mark.costly
def test_a_release_that_never_accepts_is_told_from_one_that_does(
    protector: Starter, release: Release
) -> None:
    """And what it was asked does not look like a client that waits."""
    silent = worker("accepts", "--ready", "never")
    release.becomes(*silent)
    daemon = accepting(protector, release, *SHORT)
    old = ask(("127.0.0.1", daemon.port))

    release.becomes(*worker("never_ready"))
    line = reload_failed(daemon)
    assert f"no worker accepted the probe at 127.0.0.1 port {daemon.port}" in line
    daemon.log.wait_for("event=drained generation=2")
    assert ask(("127.0.0.1", daemon.port)) == old

    release.becomes(*silent)
    daemon.reload()
    assert ask(("127.0.0.1", daemon.port)) != old
    assert "event=stranded" not in daemon.log.text()
    daemon.stop()


def test_a_release_that_dies_soon_after_it_has_accepted_is_rolled_back(
    protector: Starter, asked: Asked, gate: Gate, tmp_path: Path
) -> None:
    # In the usual second it might not have died yet on a busy machine.
    longer = "from socketprotector.model import policy\npolicy.STANDBY_S = 9.0\n"
    daemon = accepting(protector, asked.release, **injected(tmp_path / "longer", longer))
    old = get(daemon.port)
    asked.becomes("--dies", gate.path)
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    gate.open()

    line = daemon.log.wait_for("event=(reloaded|reload-failed)", after=mark)

    assert "event=reload-failed" in line
    assert "exited with status 7" in line
    assert get(daemon.port) == old
    daemon.stop()


def test_one_that_says_ready_by_itself_is_not_awaited_and_has_no_such_second(
    protector: Starter, release: Release
) -> None:
    release.becomes(*worker("accepts"))
    daemon = accepting(protector, release)
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=reloaded generation=2", after=mark)

    ready = daemon.log.wait_for("event=worker-ready generation=2", after=mark)
    assert "by=accept" not in ready
    assert "event=settling" not in daemon.log.text()
    daemon.stop()


def test_where_old_and_new_share_a_socket_time_tells_as_before(
    protector: Starter, tmp_path: Path
) -> None:
    words = ("--handoff", "listener", f"unix:{shared_path(tmp_path)}", "--")
    daemon = protector(*words, *worker("accepts", "--ready", "never")).ready()

    daemon.log.wait_for("event=worker-ready generation=1 worker=1 by=timer")
    daemon.stop()


def test_a_worker_that_joins_a_generation_that_serves_is_ready_by_time(
    protector: Starter, release: Release
) -> None:
    release.becomes(*worker("accepts", "--ready", "never"))
    daemon = accepting(protector, release)
    mark = daemon.signal(signal.SIGTTIN)

    daemon.log.wait_for("event=worker-ready generation=1 worker=2 by=timer", after=mark)
    daemon.stop()


# -- --ready accept and http: -----------------------------------------------------------


@EITHER_HANDOFF
@pytest.mark.parametrize("kind", ["accept", "http:/healthz", "http:/healthz=200"])
@pytest.mark.costly
def test_a_release_is_asked_and_serves_then(protector: Starter, asked: Asked, kind: str) -> None:
    daemon = protector("--ready", kind, "127.0.0.1:0", "--", asked.release.path).ready()
    first = get(daemon.port)

    daemon.reload()

    assert get(daemon.port) != first
    eventually(lambda: probers(daemon) == [], "the end of what has asked")
    daemon.stop()


@EITHER_HANDOFF
def test_a_release_that_answers_badly_serves_nobody_and_what_it_says_is_told(
    protector: Starter, asked: Asked
) -> None:
    words = ("--ready", "http:/healthz", *SHORT, "127.0.0.1:0", "--", asked.release.path)
    daemon = protector(*words).ready()
    old = get(daemon.port)
    asked.bad()

    line = reload_failed(daemon)

    assert f"GET /healthz: {GONE}".replace('"', r"\"") in line
    assert get(daemon.port) == old
    assert probers(daemon) == []
    daemon.log.wait_for("event=drained generation=2")
    asked.good()
    daemon.reload()
    assert get(daemon.port) != old
    assert "event=stranded" not in daemon.log.text()
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.parametrize("kind", ["accept", "http:/healthz"])
@pytest.mark.costly
def test_a_release_that_takes_no_connection_serves_nobody(
    protector: Starter, asked: Asked, kind: str
) -> None:
    words = ("--ready", kind, *SHORT, "127.0.0.1:0", "--", asked.release.path)
    daemon = protector(*words).ready()
    old = get(daemon.port)
    asked.becomes("--never")

    line = reload_failed(daemon)

    why = "no worker accepted" if kind == "accept" else "GET /healthz: no(t answered| answer)"
    assert re.search(why, line)
    daemon.log.wait_for("event=drained generation=2")
    assert get(daemon.port) == old
    asked.becomes()
    daemon.reload()
    daemon.stop()


@pytest.mark.costly
@EITHER_HANDOFF
def test_what_it_was_asked_is_in_no_count(operated: Operating, asked: Asked) -> None:
    one = operated("--ready", "http:/healthz", *SHORT, command=(str(asked.release.path),))
    for _ in range(3):
        get(one.address[1])
    asked.bad()
    one.daemon.signal(signal.SIGHUP)
    one.until_generation(2, phase="starting")
    one.daemon.log.wait_for("event=probe-failed generation=2")
    status = one.status()
    one.daemon.log.wait_for("event=drained generation=2")

    if status["forwarded"] is not None:  # else nobody counts
        assert status["forwarded"] == one.status()["forwarded"] == 3
        assert one.generation(1)["accepted"] == 3
        assert status["lost"] == one.status()["lost"] == 0
        assert [each["accepted"] for each in status["generations"]] == [3, 0]


@EITHER_HANDOFF
@pytest.mark.parametrize("how", ["upgrade", "kill"])
@pytest.mark.costly
def test_another_protector_asks_anew(
    protector: Starter, asked: Asked, how: str, tmp_path: Path
) -> None:
    words = ("--guard", "--ready", "http:/healthz", "127.0.0.1:0", "--", asked.release.path)
    daemon = protector(*words).ready()
    old = get(daemon.port)
    asked.bad()
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=probe-failed generation=2", after=mark)

    if how == "upgrade":
        assert "event=resumed" in upgrade(daemon)
    else:
        revived(daemon, kill_protector(daemon))
    assert get(daemon.port) == old
    asked.good()

    daemon.log.wait_for("event=reloaded generation=2", after=mark)
    assert get(daemon.port) != old
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_prober_that_dies_is_followed_by_another(protector: Starter, asked: Asked) -> None:
    asked.speaks_tls()
    daemon = protector("--ready", "https:/healthz", "127.0.0.1:0", "--", asked.release.path).ready()
    eventually(lambda: probers(daemon) == [], "the end of what has asked")
    asked.silent()
    mark = daemon.signal(signal.SIGHUP)
    eventually(lambda: len(probers(daemon)) == 1, "a prober")
    [first] = probers(daemon)
    os.kill(first, signal.SIGKILL)
    # Broken pipe: it died before it had its question.
    died = "event=probe-failed generation=2 .*(was killed by SIGKILL|Broken pipe)"
    daemon.log.wait_for(died, after=mark)
    asked.good()

    daemon.log.wait_for("event=reloaded generation=2", after=mark)
    daemon.stop()


@pytest.mark.costly
def test_a_stop_ends_the_question(protector: Starter, asked: Asked) -> None:
    asked.speaks_tls()
    daemon = protector("--ready", "https:/healthz", "127.0.0.1:0", "--", asked.release.path).ready()
    asked.silent()
    daemon.signal(signal.SIGHUP)
    eventually(lambda: len(probers(daemon)) == 1, "a prober")
    left = probers(daemon)

    daemon.stop()

    assert wait_gone(left) == []


@pytest.mark.costly
def test_the_worker_that_says_ready_is_not_ready_before_the_answer(
    protector: Starter, asked: Asked
) -> None:
    daemon = protector("--ready", "http:/healthz", "127.0.0.1:0", "--", asked.release.path).ready()
    asked.bad()
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=worker-ready generation=2", after=mark)
    daemon.log.wait_for("event=probe-failed generation=2", after=mark)
    assert not any("event=route" in line for line in daemon.log.seen[mark:])
    asked.good()
    daemon.log.wait_for("event=reloaded generation=2", after=mark)
    daemon.stop()


@pytest.mark.costly
def test_a_connection_that_waits_for_data_was_not_accepted(
    protector: Starter, asked: Asked
) -> None:
    """It is not in the queue; the option stays for the generation after the next."""
    words = ("--handoff", "listener", "--ready", "accept", *SHORT, "127.0.0.1:0")
    daemon = protector(*words, "--", asked.release.path).ready()
    asked.becomes("--defers", "--never")

    assert "no worker accepted the probe" in reload_failed(daemon)
    daemon.stop()


@EITHER_HANDOFF
def test_one_that_resets_what_it_accepts_has_accepted(protector: Starter, asked: Asked) -> None:
    asked.becomes("--resets")
    daemon = protector("--ready", "accept", "127.0.0.1:0", "--", asked.release.path).ready()
    daemon.reload()
    daemon.stop()


@needs.root_with("unshare")
@pytest.mark.costly
def test_where_it_cannot_be_connected_to_time_tells_by_default(
    marked_environment: dict[str, str],
) -> None:
    words = ("--handoff", "listener", "0.0.0.0:0", "--", *worker("accepts", "--ready", "never"))
    alone = ("unshare", "--net")  # without a loopback that is up
    daemon = Protector(words, marked_environment, through=alone).ready()

    daemon.log.wait_for("event=worker-ready generation=1 worker=1 by=timer")
    daemon.stop()


# -- the probe address ---------------------------------------------------------------------


def probe(*, path: str = "/healthz") -> str:
    """A check that asks at the probe address, and says what it was told."""
    script = (
        "import os,sys,urllib.request as u\n"
        f"a=u.urlopen('http://'+os.environ['SOCKETPROTECTOR_PROBE']+'{path}',timeout=60)\n"
        "open(sys.argv[1],'a').write(os.environ['SOCKETPROTECTOR_PROBE']+' '+a.read().decode())"
    )
    return f'{sys.executable} -c "{script}"'


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_check_reaches_the_generation_that_it_is_to_check(
    protector: Starter, asked: Asked, tmp_path: Path
) -> None:
    heard = tmp_path / "heard"
    check = f"check:{probe(path='/')} {heard}"
    daemon = protector("--ready", check, "127.0.0.1:0", "--", asked.release.path).ready()
    for _ in range(3):
        daemon.reload()

    told = [line.split() for line in heard.read_text().splitlines()]
    pids = [int(re.sub(r"\D", "", pid)) for _, pid in told]
    assert pids == spawned(daemon)
    eventually(lambda: probers(daemon) == [], "the end of what has asked")
    probed = {int(address.rpartition(":")[2]) for address, _ in told}
    assert not probed & {*ports_of(daemon.pid)}  # gone with the question
    daemon.stop()


@EITHER_HANDOFF
def test_any_client_may_ask_at_the_probe_address_and_clients_go_elsewhere(
    protector: Starter, asked: Asked, tmp_path: Path, gate: Gate
) -> None:
    """While the check hangs: both ways at once, many of them."""
    address = tmp_path / "address"
    good = tmp_path / "good"
    good.touch()
    check = f"check:echo $SOCKETPROTECTOR_PROBE > {address}; test -e {good} || cat {gate.path}"
    daemon = protector("--ready", check, "127.0.0.1:0", "--", asked.release.path).ready()
    old = get(daemon.port)
    good.unlink()
    address.unlink()
    mark = daemon.signal(signal.SIGHUP)
    [new] = spawned(daemon, 2)
    eventually(lambda: address.exists() and bool(address.read_text()), "the probe address")
    port = int(address.read_text().rpartition(":")[2])

    for _ in range(20):
        assert get(port) == f"[{new}]"
        assert get(daemon.port) == old
    good.touch()
    gate.stay_open()
    daemon.log.wait_for("event=reloaded generation=2", after=mark)
    assert get(daemon.port) == f"[{new}]"
    daemon.stop()


ASKS = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as one:
    try:
        one.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        print(one.makefile().read())
    except ConnectionError:
        pass
"""


@needs.ANOTHER_USER
@EITHER_HANDOFF
def test_another_user_reaches_no_private_unix_socket_through_the_probe_address(
    protector: Starter, asked: Asked, tmp_path: Path
) -> None:
    address, good = tmp_path / "address", tmp_path / "good"
    check = f"check:echo $SOCKETPROTECTOR_PROBE > {address}; test -e {good}"
    words = ("--ready", check, f"unix:{tmp_path / 's'}?mode=0600", "--", asked.release.path)
    daemon = protector(*words)
    eventually(lambda: address.exists() and bool(address.read_text()), "the probe address")
    port = address.read_text().strip().rpartition(":")[2]

    heard = [
        subprocess.run(
            [sys.executable, "-S", "-c", ASKS, port],
            user=user,
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
            timeout=DEADLINE_S,
        ).stdout.strip()
        for user in (NOBODY, os.geteuid())
    ]

    assert heard[0] == ""
    assert f"[{spawned(daemon, 1)[0]}]" in heard[1], "the check's own user is served"
    good.touch()
    daemon.ready()
    daemon.stop()


def test_where_there_can_be_none_a_check_is_told_of_none(
    protector: Starter, tmp_path: Path
) -> None:
    words = ("--handoff", "listener", "--ready", "check:test -z ${SOCKETPROTECTOR_PROBE+set}")
    daemon = protector(*words, f"unix:{shared_path(tmp_path)}", "--", *worker("accepts")).ready()
    daemon.stop()


# -- what it cannot do ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--ready", "accept", "unix:SHARED"), "both share the socket of unix:"),
        (("--ready", "http:/x", "0?defer_accept=5"), "both share the socket of 0?defer"),
        (("--ready", "http:[web]/x", "http=0"), "no listener is called web; there is: http"),
        (("--ready", "http:x", "0"), "write http:/path"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(
    protector: Starter, tmp_path: Path, words: tuple[str, ...], why: str
) -> None:
    given = [word.replace("SHARED", str(shared_path(tmp_path))) for word in words]
    daemon = protector("--handoff", "listener", *given, "--", *worker("accepts"))

    assert daemon.wait() == 2
    assert why in daemon.log.text()
