"""Checks of what a package brings: the page's unit, and the life of the Debian package itself."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from .checks import none_failed
from .guest import (
    DEADLINE_S,
    UNITS,
    Held,
    Load,
    NotRun,
    Service,
    eventually,
    is_refused,
    load_on,
    run,
    systemctl,
)
from .promises import Say, promise

PAGE = "socketprotector-page.service"
GROUP = "socketprotector-status"
WEB, METRICS = 9433, 9517
#: A folder each, as tests/packages/debs.py makes them.
PACKAGES = Path("/opt/packages")
UPGRADE = "/usr/lib/socketprotector/upgrade-running"
NAMES = ("socketprotector", "socketprotector-exporter", "python3-socketprotector-client")
#: More programs that start anew than the emulated processor may be too slow for.
_TRIES = 4


# -- the page ------------------------------------------------------------------


def _answer(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    """Return status and text.  Raises OSError."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)) as asking:
        asking.request(method, path)
        answer = asking.getresponse()
        return answer.status, answer.read().decode()


def _answers(port: int, path: str) -> bool:
    try:
        return _answer(port, path)[0] == 200
    except OSError:
        return False  # it does not listen yet


class _Viewer:
    """What the page's events say."""

    def __init__(self) -> None:
        self._asking = http.client.HTTPConnection("127.0.0.1", WEB, timeout=DEADLINE_S)
        self._asking.request("GET", "/events")
        self._answer = self._asking.getresponse()
        assert self._answer.status == 200
        self.instances: dict[str, dict[str, Any]] = {}
        self.events: list[tuple[str, str]] = []

    def until(self, name: str, **wanted: object) -> None:
        """Hear until an instance is shown so."""
        self.hear_until(lambda: wanted.items() <= self.instances.get(name, {}).items(), name)

    def hear_until(self, fact: Callable[[], bool], what: str) -> None:
        """Hear until something is true; the page speaks at least every few seconds."""
        until = time.monotonic() + DEADLINE_S
        while not fact():
            assert time.monotonic() < until, (what, self.instances, self.events)
            self.hear()

    def hear(self) -> None:
        """Take in one line; raises TimeoutError where none comes."""
        kind, _, text = self._answer.readline().decode().rstrip("\n").partition(": ")
        assert not self._answer.isclosed(), "the page has ended"
        if kind == "data":
            told = json.loads(text)
            for each in told.get("instances", []):
                self.instances[each["name"]] = each
            self.events += [(each["name"], each["event"]) for each in told.get("events", [])]

    def close(self) -> None:
        self._answer.close()
        self._asking.close()


@contextmanager
def _page() -> Iterator[int]:
    """The page's unit runs; yields its process."""
    try:
        systemctl("start", PAGE)
        eventually(lambda: _answers(WEB, "/"), "the page")
        yield _page_pid()
    finally:
        run("systemctl", "stop", PAGE)
        run("systemctl", "reset-failed", PAGE)


def _page_pid() -> int:
    return int(systemctl("show", "-P", "MainPID", PAGE))


@promise("the page's unit shows who lets its group look, without root, and comes back")
def _(say: Say) -> None:
    made = run("groupadd", "--system", GROUP).returncode == 0
    with (
        Service("open", options=f"--status-group {GROUP}", user="nobody") as seen,
        # Without this option, the unit would let the page's group look.
        Service("closed", options="--status-group nogroup", user="nobody") as unseen,
        _page_of(seen, unseen) as pid,
    ):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        users, capabilities = (
            re.findall(rf"^{name}:\s*(.*)", status, re.M)[0].split() for name in ("Uid", "CapBnd")
        )
        say(f"users {set(users)}, capabilities {capabilities}")
        assert "0" not in users
        assert int(capabilities[0], 16) == 0

        with closing(_Viewer()) as viewer:
            viewer.until("open", why="", phase="serving")
            viewer.until("closed", why="denied")
            seen.reload()
            viewer.hear_until(lambda: ("open", "reloaded") in viewer.events, "the reload")
        assert 'socketprotector_up{instance="open"} 1' in _answer(METRICS, "/metrics")[1]
        assert _answer(WEB, "/", "POST")[0] == 405

        os.kill(pid, 9)
        eventually(lambda: _page_pid() not in (0, pid), "another one in its place")
        eventually(lambda: _answers(WEB, "/"), "the page, again")
        systemctl("restart", PAGE)
        eventually(lambda: _answers(WEB, "/"), "the page after a restart")
        with closing(_Viewer()) as viewer:
            viewer.until("open", why="", phase="serving")

        done = run("systemd-analyze", "security", "--no-pager", PAGE)
        say(done.stdout.strip().rpartition("\n")[2].strip())
    if made:
        run("groupdel", GROUP)


@contextmanager
def _page_of(*services: Service) -> Iterator[int]:
    for each in services:
        each.start()
    with _page() as pid:
        yield pid


# -- the package ---------------------------------------------------------------


@contextmanager
def _in_place_of_ours() -> Iterator[None]:
    """Without the programs and units that this machine was made with; they come back."""
    aside = Path("/opt/aside")
    ours = [
        *(each for each in Path("/usr/local/bin").iterdir() if each.is_symlink()),
        *UNITS.glob("socketprotector*.s*"),
    ]
    aside.mkdir()
    moved = {each: aside / each.name for each in ours if not each.is_dir()}
    for path, kept in moved.items():
        shutil.move(path, kept)
    systemctl("daemon-reload")
    try:
        yield
    finally:
        run("dpkg", "--purge", "--force-all", *NAMES)
        for path, kept in moved.items():
            shutil.move(kept, path)
        aside.rmdir()
        systemctl("daemon-reload")


def _dpkg(*words: str) -> str:
    done = run("dpkg", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _install(which: str) -> str:
    return _dpkg("-i", *map(str, (PACKAGES / which).iterdir()))


def _left() -> list[str]:
    """What is named after us, besides this machine's own and the records of others."""
    words = ["/", "-xdev", "(", "-path", "/opt", "-o", "-path", "/var/lib/dpkg", ")", "-prune"]
    find = run(
        "find", *words, "-o", "-iregex", ".*\\(socketprotector\\|sample_?client\\).*", "-print"
    )
    return [*find.stdout.split(), *map(str, Path("/run").glob("socketprotector*"))]


def _took(which: str, service: Service, load: Load, say: Say) -> None:
    """Install a newer package under load: the same protector runs its version afterwards."""
    pid, workers = service.pid, service.workers()
    told = _install(which)
    package = run("dpkg-query", "-W", "-f", "${Version}", NAMES[0]).stdout
    version, tries = package.partition("-")[0], 1
    load.more()
    while service.status()["version"] != version:
        # The emulated processor may have been too slow for the time that a new program has.
        assert "did not answer in" in told, told
        assert tries < _TRIES
        tries += 1
        told = run(UPGRADE).stderr
        load.more()
    say(f"{which}: runs {version} after {tries} tries; {load.text()}")
    assert load.failures == 0, load.text()
    assert (service.status()["version"], service.pid) == (version, pid)
    assert service.workers() == workers
    assert service.show("NRestarts") == "0"


@promise(
    "the Debian package: upgraded under load with no client refused; a purge leaves nothing",
    packaged=True,
)
def _(say: Say) -> None:
    if not PACKAGES.exists():
        raise NotRun("no packages were built outside, for want of what builds them")
    # What starts beside the package's programs may take minutes here.
    options = f"--status-group {GROUP} --start-timeout 20m"
    with _in_place_of_ours():
        _install("good")
        assert not run("systemctl", "list-units", "--no-legend", "socketprotector*").stdout
        with Service("packaged", "/usr/bin/SampleClient {port}", options, user="nobody") as service:
            systemctl("enable", service.unit)
            with load_on(service.start()) as load, closing(Held(service.port)) as held:
                first = held.ask()
                with _page(), closing(_Viewer()) as viewer:
                    viewer.until("packaged", why="", phase="serving")
                service.reload()
                assert service.status_text == "generation 2 is serving"
                load.more()

                _took("next", service, load, say)
                service.kill()
                load.more()
                if shutil.which("needrestart"):
                    pid = service.pid
                    run("needrestart", "-r", "a")
                    assert service.pid == pid
                    say("needrestart -r a has left it alone")
                assert held.ask() == first
                none_failed(load, say, "a reload, an upgrade of the package, a SIGKILL", allowed=1)
            systemctl("start", PAGE)
            assert service.processes()

            _dpkg("-r", *NAMES)

            assert service.show("ActiveState") == "inactive"
            assert service.processes() == []
            assert is_refused(service.port)
            assert _page_pid() == 0
            assert service.settings.exists()  # the operator's
            _dpkg("-P", *NAMES)
        assert _left() == []
        assert GROUP not in Path("/etc/group").read_text(encoding="utf-8")
