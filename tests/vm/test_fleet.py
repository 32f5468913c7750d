"""A real machine among the hosts behind HAProxy: its reloads, its stops and its reboots.

HAProxy, with deploy/haproxy.cfg, and a second host are namespaces; host1 of that file is a guest of
qemu with the shipped units, on the same bridge by a tap device.  (What qemu forwards by itself,
`hostfwd`, would accept also for a guest that is down.)  What HAProxy had of a server at each moment
is what it has logged.  No timing decides: waits have generous ends.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from bench.processes import CannotMeasure
from tests import needs
from tests.fleet.hosts import Balancer, Host, Load, Network, releases

from .commanded import LIMIT_S, WORDS, Commanded
from .machine import SYSTEMS, System, disk, missing, qemu

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

GUEST, OTHER, ADDRESS = "host1", "host2", "10.0.0.11"
#: An emulated processor is some twenty times slower, so HAProxy waits longer for the answers to its
#: checks, and asks its agent less often; and the lame duck has time for many such answers.
TIMES = {
    "timeout check 1s": "timeout check 20s",
    "inter 2s fall 2": "inter 5s fall 3",
    "agent-inter 500ms": "agent-inter 2s",
}
LAME_DUCK = "60s"
#: Of both hosts together.
PER_SECOND = 30
#: So many answers of the guest show that it is in rotation.
SOME = 50
UNIT, EXPORTER = "socketprotector@web.service", "socketprotector-exporter.service"
WORKERS = {"connection": "listener", "listener": "fd:{fd:http}"}
_BOOTED = [each for each in SYSTEMS if each.name in ("bookworm", "trixie")]
_NEEDED = ("haproxy", "ip", "unshare", "nsenter")
_T = TypeVar("_T")


def _nothing_in_the_way() -> str:
    """Say what is missing here; an empty text if nothing is."""
    if trouble := missing():
        return trouble
    if tools := [each for each in _NEEDED if shutil.which(each) is None]:
        return f"there is no {', no '.join(tools)} here"
    return "" if os.path.exists("/dev/net/tun") else "there is no /dev/net/tun here"


class Site:
    """Both hosts and the balancer."""

    def __init__(self, guest: Commanded, balancer: Balancer, log: Path) -> None:
        self.guest, self.balancer, self._log = guest, balancer, log

    def until(self, fact: Callable[[], _T], what: str) -> _T:
        """Wait until a fact holds, and return it; each look may start a program.

        Raises AssertionError with what HAProxy and the guest's console have said.
        """
        until_s = time.monotonic() + LIMIT_S
        while not (found := fact()):
            assert time.monotonic() < until_s, (
                f"never came: {what}\n{self.said}\n{self.guest.last_words}"
            )
            time.sleep(0.5)
        return found

    @property
    def said(self) -> list[str]:
        """All that HAProxy has logged of the guest, in order: each change of its state."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        name = f"Server web/{GUEST} "
        return [line.partition(name)[2] for line in lines if name in line]

    def says(self, what: str, after: int) -> None:
        """Wait until HAProxy logs that of the guest.  after: so many lines of `said`."""
        self.until(lambda: any(what in line for line in self.said[after:]), f"HAProxy: {what}")

    def up(self) -> None:
        """Wait until HAProxy has the guest in rotation."""
        self.until(lambda: self.balancer.state(GUEST) == "UP", "the guest UP")

    def figure(self, name: str, server: str = GUEST) -> int:
        """One number that HAProxy has of a server."""
        return int(self.balancer.figures(server)[name] or 0)

    def answers(self) -> None:
        """Wait until the guest has answered some more clients; checks are not counted."""
        wanted = self.figure("hrsp_2xx") + SOME
        self.until(lambda: self.figure("hrsp_2xx") >= wanted, f"{SOME} more answers of the guest")

    def show(self, name: str, unit: str = UNIT) -> str:
        """What systemd has of a unit."""
        return self.guest.run("systemctl", "show", "-P", name, unit).strip()

    def set_up(self) -> None:
        """Give the guest its address, and its exporter the agent."""
        run, write = self.guest.run, self.guest.write
        write("/etc/systemd/network/test.network", "[Match]", "Name=en*", "[Network]",
              f"Address={ADDRESS}/24", "LinkLocalAddressing=no", "IPv6AcceptRA=no")  # fmt: skip
        write(f"/etc/systemd/system/{EXPORTER}.d/test.conf", "[Service]", "ExecStart=",
              "ExecStart=socketprotector-exporter --all --listen 127.0.0.1:9517"
              f" --agent {ADDRESS}:9518")  # fmt: skip
        run("systemctl", "unmask", "systemd-networkd-wait-online.service")
        run("groupadd", "--system", "--force", "socketprotector-status")
        run("systemctl", "daemon-reload")
        run("systemctl", "enable", "--now", "systemd-networkd.service")
        run("systemctl", "enable", "--now", EXPORTER)

    def settings(self, handoff: str) -> None:
        """Write the settings of the guest's protector."""
        command = ["/opt/venv/bin/python", "/opt/http_worker.py", WORKERS[handoff]]
        self.guest.write(
            "/etc/socketprotector/web.toml",
            'listen = ["http=0.0.0.0:8000"]',
            f"command = {command}",
            f'handoff = "{handoff}"',
            f'lame-duck = "{LAME_DUCK}"',
            'start-timeout = "20m"',
            'user = "nobody"',
        )


@contextmanager
def _site(system: System, folder: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        root, image = stack.enter_context(disk(system, packaged=False))
        network = stack.enter_context(Network())
        space = network.tap("guest")
        card = ("-netdev", "tap,id=net,ifname=guest,script=no,downscript=no",
                "-device", "virtio-net-pci,netdev=net,romfile=")  # fmt: skip
        command = [*("ip", "netns", "exec", space), *qemu(system, root, image, WORDS), *card]
        guest = stack.enter_context(Commanded(command, image.with_name("console")))
        releases(folder)
        other = Host(network, OTHER, "10.0.0.12", folder / f"{OTHER}.log")
        stack.callback(other.end)
        other.serve(folder, ())
        log = folder / "balancer.log"
        balancer = Balancer(network, "balancer", "10.0.0.1", log)
        stack.callback(balancer.end)
        guest.booted()
        site = Site(guest, balancer, log)
        site.set_up()
        site.settings("connection")
        guest.run("systemctl", "enable", "--now", UNIT)
        unused = {f"    server host{n} 10.0.0.{10 + n}:8000\n": "" for n in (3, 4, 5)}
        balancer.balance(folder / "haproxy.cfg", TIMES | unused)
        yield site


@pytest.fixture(scope="module", params=_BOOTED, ids=lambda system: system.name)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    if trouble := _nothing_in_the_way():
        needs.skip("packages of make test-vm", trouble)
    with ExitStack() as stack:
        try:
            made = _site(request.param, tmp_path_factory.mktemp("fleet"))
            found = stack.enter_context(made)
        except CannotMeasure as error:
            needs.skip("a machine that comes up", error)
        yield found


@pytest.fixture(scope="module", params=WORKERS)
def web(site: Site, request: pytest.FixtureRequest) -> Site:
    """The site, with a guest that serves in that handoff mode."""
    site.settings(request.param)
    site.guest.run("systemctl", "restart", UNIT)
    site.up()
    return site


@pytest.fixture
def load(web: Site) -> Iterator[Load]:
    """Clients, half of which keep their connections; the guest has answered some of them."""
    made = Load(web.balancer, PER_SECOND)
    web.answers()
    yield made
    made.end()


def no_request_failed(web: Site, load: Load) -> None:
    told = load.told()
    of_each = {each: web.figure("hrsp_2xx", each) for each in (GUEST, OTHER)}
    again = {name: web.figure(name) for name in ("wretr", "wredis", "econ", "eresp")}
    print(
        f"{told.answered} answered, {len(told.failures)} failed, the longest took"
        f" {told.longest_s * 1000:.0f} ms; of each host so far {of_each}, of the guest {again}"
    )
    assert told.failures == []


def test_reloads_never_leave_the_rotation(web: Site, load: Load) -> None:
    before = web.said
    generations = set()
    for _ in range(3):
        web.guest.run("systemctl", "reload", UNIT)
        generations.add(web.show("StatusText"))
        web.answers()

    assert len(generations) == 3, generations
    assert web.said == before
    assert web.balancer.state(GUEST) == "UP"
    no_request_failed(web, load)


def test_a_stop_and_a_start_fail_no_request(web: Site, load: Load) -> None:
    before = len(web.said)

    web.guest.run("systemctl", "stop", UNIT)
    assert web.show("Result") == "success"
    web.says("DOWN", before)
    web.guest.run("systemctl", "start", UNIT)
    web.up()
    web.answers()

    assert "drain" in web.said[before], web.said[before:]
    no_request_failed(web, load)


def test_a_reboot_fails_no_request_and_the_machine_comes_back(web: Site, load: Load) -> None:
    before, boots = len(web.said), web.guest.boots

    web.guest.tell("systemctl", "reboot")
    web.says("DOWN", before)
    web.guest.booted()
    web.up()
    web.answers()

    assert web.guest.boots == boots + 1
    # The exporter has outlived the protector: HAProxy was told before anything failed.
    assert "drain" in web.said[before], web.said[before:]
    no_request_failed(web, load)
