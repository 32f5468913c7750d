"""Machines of a test: each has its own network, processes, /run and /srv; a bridge joins them.

The bridge is in a network namespace, too, so nothing of it is on the machine that runs the test;
the addresses are those of deploy/.  Source: ip-netns(8), unshare(1), nsenter(1).
"""

from __future__ import annotations

import csv
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.processes import CannotMeasure
from tests.running import ROOT, eventually

DEPLOY = ROOT / "deploy"
TOOLS = Path(os.environ.get("FLEET_TOOLS", ROOT / ".venv" / "fleet")) / "bin"
PROGRAMS = Path(sys.executable).parent
PATH = f"{PROGRAMS}:{TOOLS}:/usr/sbin:/usr/bin:/sbin:/bin"
HERE = Path(__file__).parent
#: Generous: five hosts on one busy machine are slow.
LIMIT_S = 300.0
#: What a machine needs of the one that it is on.
NEEDED = ("ip", "unshare", "nsenter", "/usr/sbin/sshd", "ssh-keygen", "haproxy", "flock")
_INIT = """
set -e
trap '' CHLD        # so that the kernel reaps what is left to this process
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /srv
mkdir -p /run/sshd /srv/web/releases /srv/web/live
echo here
exec sleep infinity
"""


#: Wait for a fact.  Five hosts start, and Ansible works, for longer than one process does.
wait = functools.partial(eventually, deadline_s=LIMIT_S)


def _do(*words: str | Path) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMeasure(f"{shlex.join(map(str, words))}: {done.stderr.strip()}")


class Network:
    """A bridge in a namespace of its own; a context manager."""

    def __init__(self) -> None:
        self._switch = f"sp{os.getpid()}-switch"
        self._spaces: list[str] = []

    def __enter__(self) -> Self:
        self.add(self._switch)
        _do("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _do("ip", "-n", self._switch, "link", "set", "bridge", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for each in reversed(self._spaces):
            _do("ip", "netns", "delete", each)

    def add(self, space: str) -> None:
        """Make a network namespace."""
        _do("ip", "netns", "add", space)
        self._spaces.append(space)
        _do("ip", "-n", space, "link", "set", "lo", "up")

    def plug(self, name: str, address: str) -> str:
        """Return a namespace that is connected to the bridge with that address."""
        space = f"sp{os.getpid()}-{name}"
        self.add(space)
        link = ("type", "veth", "peer", "name", "eth0", "netns", space)
        _do("ip", "-n", self._switch, "link", "add", name, *link)
        _do("ip", "-n", self._switch, "link", "set", name, "master", "bridge", "up")
        _do("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        _do("ip", "-n", space, "link", "set", "eth0", "up")
        return space

    def tap(self, name: str) -> str:
        """Connect a tap device of that name to the bridge; return the namespace that it is in."""
        _do("ip", "-n", self._switch, "tuntap", "add", "dev", name, "mode", "tap")
        _do("ip", "-n", self._switch, "link", "set", name, "master", "bridge", "up")
        return self._switch

    def unplug(self, name: str) -> None:
        """Take a machine's link away: from then on nothing comes from it, not even an end."""
        _do("ip", "-n", self._switch, "link", "set", name, "down")


class Machine:
    """One of them: what runs in it ends with it."""

    def __init__(self, network: Network, name: str, address: str, log: Path) -> None:
        """log: where all that it runs writes."""
        self.name, self.address, self.log = name, address, log
        self._network, self._log = network, log.open("ab")
        self._space = network.plug(name, address)
        namespaces = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._unshare = subprocess.Popen(
            ["ip", "netns", "exec", self._space, "unshare", *namespaces, "sh", "-c", _INIT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._started: list[subprocess.Popen[Any]] = []
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != b"here\n":
            raise CannotMeasure(f"{name}: no namespaces here: {log.read_text()}")
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        self._init = children.read_text().split()[0]

    def start(self, *words: str | Path, **more: Any) -> subprocess.Popen[Any]:
        """Run a command in it."""
        environment = {**os.environ, "PATH": PATH, "PYTHONPATH": str(ROOT)}
        environment.pop("XDG_RUNTIME_DIR", None)
        environment |= more.pop("environment", {})
        enter = ("nsenter", "--target", self._init, "--mount", "--pid", "--net", "--")
        defaults = {"stdin": subprocess.DEVNULL, "stdout": self._log, "stderr": self._log}
        self._started.append(
            subprocess.Popen([*enter, *words], env=environment, **{**defaults, **more})
        )
        return self._started[-1]

    def run(self, *words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in it to its end."""
        process = self.start(
            *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
        )
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def signal(self, process: subprocess.Popen[Any], number: signal.Signals) -> None:
        """Send a signal to a command that was started in it: to the child of nsenter."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), number)

    def die(self) -> None:
        """Be gone as by a power cut: the link first, so that no peer hears of it."""
        self._network.unplug(self.name)
        self.end()

    def end(self) -> None:
        """Kill all that runs in it."""
        self._unshare.send_signal(signal.SIGKILL)
        self._unshare.wait(LIMIT_S)
        for each in self._started:
            each.send_signal(signal.SIGCONT)  # nsenter stops with its child
            each.wait(LIMIT_S)
            for stream in (each.stdin, each.stdout, each.stderr):
                if stream is not None:
                    stream.close()
        assert self._unshare.stdout is not None
        self._unshare.stdout.close()
        self._log.close()


@dataclass(frozen=True)
class Told:
    """What clients have met so far."""

    answered: int
    failures: list[str]
    longest_s: float


class Load:
    """Clients of the balancer: half keep their connections, half make one for each request."""

    def __init__(self, balancer: Machine, per_second: float) -> None:
        words = (sys.executable, str(HERE / "load.py"), "80", str(per_second))
        self._process = balancer.start(
            *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def told(self) -> Told:
        """Ask them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Told(**json.loads(self._process.stdout.readline()))

    def end(self) -> None:
        """Let them get their last answers."""
        self._process.communicate(timeout=LIMIT_S)


class Host(Machine):
    """A machine with a protector and its exporter."""

    sshd: subprocess.Popen[Any]  #: of a fleet

    def serve(self, folder: Path, options: tuple[str, ...]) -> None:
        """Start both, with release 1."""
        self._options = options
        self.release(folder, "1")
        self.protect()
        self.export()

    def protect(self) -> None:
        """Start the protector, and wait until it serves."""
        self.protector = self.start(
            *(sys.executable, "-P", "-m", "socketprotector"),
            *("-f", "--log-file", "/run/web.log", "--name", "web", "--lame-duck", "5s"),
            *("--releases", "/srv/web/releases", "--current", "/srv/web/live/current"),
            *(*self._options, "0.0.0.0:8000", "--", "{release}/daemon"),
        )
        wait(lambda: self.ctl("ready").returncode == 0, f"{self.name} serves")

    def export(self) -> None:
        """Start the exporter."""
        words = ("--listen", "0.0.0.0:9517", "--agent", "0.0.0.0:9518")
        self.exporter = self.start(PROGRAMS / "socketprotector-exporter", *words)

    def release(self, folder: Path, version: str) -> None:
        """Put a release there, as what the next start takes."""
        self.run("cp", "-a", folder / "releases" / version, f"/srv/web/releases/{version}")
        self.run("ln", "-sfn", f"../releases/{version}", "/srv/web/live/current")

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """socketprotectorctl."""
        return self.run(PROGRAMS / "socketprotectorctl", "--name", "web", *words)

    @property
    def status(self) -> dict[str, Any]:
        """What the protector says."""
        found: dict[str, Any] = json.loads(self.ctl("status", "--json").stdout)
        return found

    @property
    def version(self) -> str:
        """That of the release that serves."""
        return str(self.status["releases"]["serving"])

    @property
    def current(self) -> str:
        """That of the release which a restart would start."""
        return Path(self.run("readlink", "/srv/web/live/current").stdout.strip()).name

    def has(self, version: str) -> bool:
        """Whether a release is there, served or not."""
        return version in self.run("ls", "/srv/web/releases").stdout.split()

    def mode(self, version: str) -> str:
        """The mode of a release's folder."""
        return self.run("stat", "-c", "%a", f"/srv/web/releases/{version}").stdout.strip()

    @property
    def reloads(self) -> list[str]:
        """How each ended."""
        return [each["result"] for each in self.status["reloads"]]


class Balancer(Machine):
    """A machine with HAProxy, by deploy/haproxy.cfg."""

    def balance(self, path: Path, changes: Mapping[str, str]) -> None:
        """Start it.  path: for its file.  changes: what stands there in the place of what."""
        text = (DEPLOY / "haproxy.cfg").read_text()
        for given, other in changes.items():
            assert given in text, given
            text = text.replace(given, other)
        path.write_text(text)
        self.haproxy = self.start("haproxy", "-W", "-db", "-f", path)

    @property
    def workers(self) -> int:
        """How many workers HAProxy has started: one more by each reload."""
        return self.log.read_text().count("New worker (")

    def state(self, server: str) -> str:
        """What it has of a server: UP, DRAIN, DOWN; "" where it does not answer yet."""
        return self.figures(server).get("status", "").split(" ")[0]

    def agent(self, server: str) -> str:
        """What came of the last agent-check: L7OK, L4CON, ..."""
        return self.figures(server).get("agent_status", "")

    def held_by(self, host: Host) -> int:
        """How many connections to a host's service are open: in use, or kept for later."""
        words = ("state", "established", "dst", f"{host.address}:8000")
        return len(self.run("ss", "-Htn", *words).stdout.splitlines())

    def figures(self, server: str) -> dict[str, str]:
        """All that it says of a server, by the names of HAProxy's `show stat`."""
        program = (
            "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy.sock');"
            "s.sendall(b'show stat -1 4 -1\\n');"
            "print(b''.join(iter(lambda: s.recv(65536), b'')).decode())"
        )
        said = self.run("/usr/bin/python3", "-I", "-c", program).stdout
        names, *rows = ([*csv.reader(said.splitlines())]) or [[]]
        found = [dict(zip(names, row, strict=False)) for row in rows if row]
        return next((each for each in found if each["svname"] == server), {})


def releases(folder: Path) -> None:
    """Write releases 1 to 3 there, and two that fail."""
    faults = {"bad": "broken", "late": "late 5"}
    for version in ("1", "2", "3", *faults):
        daemon = folder / "releases" / version / "daemon"
        daemon.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, str(HERE / "web.py"), version, *faults.get(version, "").split()]
        daemon.write_text(f"#!/bin/sh\nexec {shlex.join(words)}\n")
        daemon.chmod(0o755)


class Fleet:
    """Five hosts behind HAProxy, and the operator's machine with Ansible: deploy/ as it stands."""

    SIZE = 5

    def __init__(self, folder: Path, network: Network, options: tuple[str, ...]) -> None:
        self.folder, self.network, self.options = folder, network, options
        self._keys()
        releases(folder)
        self.operator = Machine(network, "operator", "10.0.0.2", folder / "operator.log")
        self.balancer = Balancer(network, "balancer", "10.0.0.1", folder / "balancer.log")
        self.hosts: list[Host] = []
        self.machines: list[Machine] = [self.operator, self.balancer]

    def start(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Start all hosts and the balancer.  say: hears of each host that serves."""
        for number in range(1, self.SIZE + 1):
            say(f"{self.add(number).name} serves release 1")
        # Shorter times for a host that is dead.
        shorter = {"server 1m": "server 5s", "connect 5s": "connect 1s"}
        self.balancer.balance(self.folder / "haproxy.cfg", shorter)
        for host in self.hosts:
            wait(lambda host=host: self.balancer.state(host.name) == "UP", f"{host.name} UP")  # type: ignore[misc]
        say("HAProxy sends clients to all of them")

    def add(self, number: int) -> Host:
        """Start a host."""
        name = f"host{number}"
        host = Host(self.network, name, f"10.0.0.{10 + number}", self.folder / f"{name}.log")
        self.machines.append(host)
        self.hosts.append(host)
        host.serve(self.folder, self.options)
        words = ("/usr/sbin/sshd", "-D", "-e", "-f", self.folder / "sshd_config")
        host.sshd = host.start(*words, umask=0o077)  # as logins of hardened hosts have it
        return host

    def close(self) -> None:
        """End all."""
        with ExitStack() as ends:  # the others, too, where one cannot be ended
            for each in self.machines:
                if each._unshare.returncode is None:
                    ends.callback(each.end)

    def _keys(self) -> None:
        for name in ("host", "operator"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name)
        (self.folder / "sshd_config").write_text(
            f"""\
HostKey {self.folder}/host
AuthorizedKeysFile {self.folder}/operator.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
Subsystem sftp internal-sftp
SetEnv PATH={PATH} TMPDIR=/run
"""
        )

    def releasing(self, version: str, *words: str) -> subprocess.Popen[Any]:
        """Begin a release, as an operator does."""
        environment = {
            "ANSIBLE_HOST_KEY_CHECKING": "false",
            "ANSIBLE_REMOTE_USER": "root",
            "ANSIBLE_PRIVATE_KEY_FILE": str(self.folder / "operator"),
            "ANSIBLE_REMOTE_TEMP": "/run/ansible",
            "ANSIBLE_LOCAL_TEMP": str(self.folder / "ansible"),
            "ANSIBLE_HOME": str(self.folder / "ansible"),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": "/run/ssh",
            "ANSIBLE_PYTHON_INTERPRETER": "/usr/bin/python3",
            "ANSIBLE_NOCOLOR": "1",
            "RELEASE_LOCK": str(self.folder),
        }
        source = f"socketprotector_release_source={self.folder}/releases/{version}"
        return self.operator.start(
            *(
                str(DEPLOY / "ansible" / "release"),
                "-e",
                f"version={version}",
                "-e",
                source,
                *words,
            ),
            environment=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def release(self, version: str, *words: str) -> tuple[int, str]:
        """Release to all; return the exit status and what was said."""
        process = self.releasing(version, *words)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    @property
    def versions(self) -> list[str]:
        """What each host serves."""
        return [each.version for each in self.hosts]


@contextmanager
def fleet(
    folder: Path,
    *options: str,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Fleet]:
    """Five hosts that serve release 1.  options: of their protectors.  say: hears of each."""
    with Network() as network:
        made = Fleet(folder, network, options)
        try:
            made.start(say)
            yield made
        finally:
            made.close()
