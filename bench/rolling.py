"""python -m bench.rolling: replace protectors one by one behind HAProxy, and count what fails.

Each server of HAProxy is a protector, whose `/readyz/NAME` it asks the exporter for, or the
exporter's agent (--agent); each with another lag, from none up to --lag.  One at a time is told to
stop (TERM), awaited and started anew, while clients ask over HTTP: half of them over connections
that they keep, half with a new one for each request.  HAProxy tries nothing a second time, so a
client that is refused is a failure.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Self

from bench.figures import machine
from bench.processes import HERE, CannotMeasure

START_LIMIT_S = 60.0
ASK_LIMIT_S = 30.0
_LOOK_S = 0.02
#: So many checks must fail in a row: the lag is that many intervals at most, and one less at least.
FALL = 4
#: Between two checks where there is to be no lag.
SOON_MS = 50
_CONFIGURATION = """
global
    stats socket {folder}/haproxy.sock
defaults
    mode http
    balance roundrobin
    retries 0
    timeout connect 5s
    timeout check 5s
    timeout client 1m
    timeout server 1m
listen web
    bind 127.0.0.1:{port}
"""
_BY_HTTP = """\
    option httpchk
    http-check send meth GET uri-lf /readyz/%[srv_name]
    http-check expect status 200
"""
_SERVER = (
    "    server {name} 127.0.0.1:{port} check {lag} rise 1 fastinter {every}ms downinter 100ms"
)
_ASKS = " port {ask}\n"
_ASKS_AGENT = ' agent-check agent-port {ask} agent-inter {every}ms agent-send "{name}\\n"\n'
_PROGRAMS = Path(sysconfig.get_path("scripts"))
#: Connections in a queue, to workers on the library; or a listener, to a server of its own.
WORKERS: dict[str, tuple[str, ...]] = {
    "connection": ("listener",),
    "listener": ("fd:{fd:http}",),
}


def wait(fact: Callable[[], bool], what: str, limit_s: float = START_LIMIT_S) -> None:
    """Look until a fact holds.  Raises CannotMeasure after a while."""
    until_s = time.monotonic() + limit_s
    while not fact():
        if time.monotonic() > until_s:
            raise CannotMeasure(f"never came: {what}")
        time.sleep(_LOOK_S)


class Reserved:
    """A port of 127.0.0.1 that only a process that asks for its number gets."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give it up."""
        self._socket.close()


@dataclass
class Server:
    """One server of HAProxy."""

    name: str
    lag_s: float
    port: int
    process: subprocess.Popen[bytes]


class Balanced:
    """Protectors behind HAProxy, and the exporter that it asks; a context manager."""

    def __init__(
        self,
        folder: Path,
        lags_s: Sequence[float],
        *options: str,
        handoff: str = "connection",
        agent: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start all and wait until HAProxy sends clients to each.

        lags_s: for each server how late HAProxy is to see that it is not ready.  options: of the
        protectors.  agent: HAProxy asks the agent, beside a check that connects.  Raises
        CannotMeasure.
        """
        self._folder = folder
        self._agent = agent
        self._options = ("--handoff", handoff, *options)
        self._worker = WORKERS[handoff]
        self._environment = {
            **os.environ,
            **(environment or {}),
            "XDG_RUNTIME_DIR": str(folder),
        }
        self._log = (folder / "log").open("wb")
        self._ports = [Reserved() for _ in range(len(lags_s) + 3)]
        self._others: list[subprocess.Popen[bytes]] = []
        self.servers: list[Server] = []
        try:
            self._start(lags_s)
        except BaseException:
            self.close()
            raise

    @property
    def port(self) -> int:
        """Where clients connect."""
        return self._ports[0].number

    @property
    def log(self) -> str:
        """What all of them have written."""
        return (self._folder / "log").read_text(errors="replace")

    def _start(self, lags_s: Sequence[float]) -> None:
        _, ask, agent, *ports = (each.number for each in self._ports)
        for number, (lag_s, port) in enumerate(zip(lags_s, ports, strict=True)):
            name = f"s{number}"
            self.servers.append(Server(name, lag_s, port, self._protector(name, port)))
        exporter = str(_PROGRAMS / "socketprotector-exporter")
        listens = ("--listen", f"127.0.0.1:{ask}", "--agent", f"127.0.0.1:{agent}")
        self._others.append(self._run(exporter, *listens))
        text = _CONFIGURATION.format(folder=self._folder, port=self.port)
        text += "" if self._agent else _BY_HTTP
        asked, line = (agent, _SERVER + _ASKS_AGENT) if self._agent else (ask, _SERVER + _ASKS)
        for each in self.servers:
            every = max(SOON_MS, int(each.lag_s * 1000 / FALL))
            lag = f"inter {every}ms fall {FALL if each.lag_s else 1}"
            text += line.format(name=each.name, port=each.port, ask=asked, lag=lag, every=every)
        path = self._folder / "haproxy.cfg"
        path.write_text(text)
        # HAProxy takes all servers for ready until it has asked them.
        for each in self.servers:
            wait(partial(_is_ready, ask, each), f"{each.name} ready")
        self._others.append(self._run("haproxy", "-db", "-f", str(path)))
        for each in self.servers:
            self.wait_for(each, "UP")

    def _run(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            words,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def _protector(self, name: str, port: int) -> subprocess.Popen[bytes]:
        worker = (sys.executable, str(HERE / "http_worker.py"), *self._worker)
        words = ("-f", "--name", name, *self._options, f"http=127.0.0.1:{port}", "--", *worker)
        return self._run(str(_PROGRAMS / "SocketProtector"), *words)

    # -- what HAProxy sees -----------------------------------------------------

    @property
    def out(self) -> str:
        """The state of a server that gets no more clients, and serves on."""
        return "DRAIN" if self._agent else "DOWN"

    def state(self, server: Server) -> str:
        """Return UP, DRAIN or DOWN, or "" where HAProxy does not answer yet."""
        with socket.socket(socket.AF_UNIX) as line:
            try:
                line.connect(str(self._folder / "haproxy.sock"))
                line.sendall(b"show stat -1 4 -1\n")
                text = b"".join(iter(lambda: line.recv(65536), b"")).decode()
            except OSError:
                return ""
        names, *rows = (row.split(",") for row in text.splitlines() if row)
        for row in rows:
            found = dict(zip(names, row, strict=False))
            if found["svname"] == server.name:
                # "UP 1/3" is on its way to DOWN; "DOWN (agent)"
                return found["status"].split()[0]
        return ""

    def wait_for(self, server: Server, state: str) -> None:
        """Wait until HAProxy has seen that."""
        wait(lambda: self.state(server) == state, f"{server.name} {state}: {self.log}")

    # -- what is done ----------------------------------------------------------

    def tell(self, server: Server) -> None:
        """Tell one to stop."""
        server.process.send_signal(signal.SIGTERM)

    def start_again(self, server: Server) -> None:
        """Wait for one's end, start it anew and wait until HAProxy sends clients there."""
        status = server.process.wait(START_LIMIT_S)
        if status:
            raise CannotMeasure(f"{server.name} ended with status {status}: {self.log}")
        server.process = self._protector(server.name, server.port)
        self.wait_for(server, "UP")

    def close(self) -> None:
        """End all, at once."""
        for other in self._others:
            other.terminate()
        for server in self.servers:
            server.process.send_signal(signal.SIGINT)
        for each in (*self._others, *(server.process for server in self.servers)):
            each.wait(START_LIMIT_S)
        self._log.close()
        for port in self._ports:
            port.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_ready(port: int, server: Server) -> bool:
    """Ask the exporter."""
    connection = HTTPConnection("127.0.0.1", port, timeout=ASK_LIMIT_S)
    try:
        connection.request("GET", f"/readyz/{server.name}")
        return connection.getresponse().status == HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


@dataclass
class Clients:
    """Threads that ask over HTTP until they are stopped; a context manager."""

    port: int
    threads: int = 8
    per_second: float = 200.0
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        for number in range(self.threads):
            keeps = number % 2 == 0
            self._running.append(threading.Thread(target=self._ask_on, args=(keeps,)))
            self._running[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End when the last requests are answered."""
        self._stop.set()
        for each in self._running:
            each.join()
        self._running.clear()

    def _ask_on(self, keeps: bool) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ASK_LIMIT_S)
        headers = {} if keeps else {"Connection": "close"}
        due_s = time.monotonic()
        while not self._stop.wait(max(0.0, due_s - time.monotonic())):
            due_s += self.threads / self.per_second
            began_s = time.monotonic()
            why = _ask(connection, headers)
            taken_s = time.monotonic() - began_s
            with self._lock:
                self.longest_s = max(self.longest_s, taken_s)
                if why:
                    self.failures.append(f"{'kept' if keeps else 'short'}: {why}")
                else:
                    self.answered += 1
        connection.close()


def _ask(connection: HTTPConnection, headers: Mapping[str, str]) -> str:
    """Send one request; return why it has failed, or ""."""
    try:
        connection.request("GET", "/", headers=dict(headers))
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, HTTPException) as error:
        connection.close()  # the next request connects anew
        return repr(error)
    return "" if (answer.status, body) == (200, b"pong") else f"{answer.status} {body[:40]!r}"


def main() -> int:
    """Print what has failed; 1 if anything has."""
    parser = argparse.ArgumentParser(prog="python -m bench.rolling", description=__doc__)
    parser.add_argument("--replacements", type=int, default=50, metavar="N")
    parser.add_argument("--lame-duck", default="10s", metavar="TIME", help="0: none")
    parser.add_argument("--lag", type=float, default=8.0, metavar="S", help="the longest one")
    parser.add_argument("--servers", type=int, default=5, metavar="N")
    parser.add_argument("--agent", action="store_true", help="HAProxy asks the agent")
    parser.add_argument("--handoff", choices=WORKERS, default="connection")
    given = parser.parse_args()
    lags_s = [number * given.lag / (given.servers - 1) for number in range(given.servers)]
    seen_out_s: dict[float, list[float]] = {lag_s: [] for lag_s in lags_s}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        options = ("--lame-duck", given.lame_duck)
        begun_s = time.monotonic()
        with (
            Balanced(
                Path(folder), lags_s, *options, handoff=given.handoff, agent=given.agent
            ) as balanced,
            Clients(balanced.port) as clients,
        ):
            for number in range(given.replacements):
                server = balanced.servers[number % given.servers]
                told_s = time.monotonic()
                balanced.tell(server)
                balanced.wait_for(server, balanced.out)
                seen_out_s[server.lag_s].append(time.monotonic() - told_s)
                balanced.start_again(server)
                print(
                    f"{number + 1}: {server.name}, {clients.answered} answered, "
                    f"{len(clients.failures)} failed",
                    file=sys.stderr,
                )
            clients.stop()
        spent_s = time.monotonic() - begun_s
    print(f"{machine()}; {given.replacements} replacements in {spent_s:.0f} s, --lame-duck "
          f"{given.lame_duck}, --handoff {given.handoff}"
          f"{', by the agent' if given.agent else ''}\n")  # fmt: skip
    for lag_s, found in seen_out_s.items():
        if found:
            print(f"a lag of {lag_s:g} s: HAProxy sends no more after {max(found):.1f} s at most")
    total = clients.answered + len(clients.failures)
    print(f"\n{len(clients.failures)} of {total:,} requests failed; the longest took "
          f"{clients.longest_s * 1000:.0f} ms")  # fmt: skip
    for why, count in Counter(clients.failures).most_common():
        print(f"    {count} x {why}")
    return 1 if clients.failures else 0


if __name__ == "__main__":
    sys.exit(main())
