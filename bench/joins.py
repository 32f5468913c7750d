"""python -m bench.joins [SECONDS] [HOST]: probes of an address under load, as many as possible.

At each probe's begin and end a third socket joins and leaves the address's SO_REUSEPORT group.  The
kernel must never give it a client.  If it does, it counts a TCPMinTTLDrop, and the client waits for
a second.  Nothing else may use IP_MINTTL in this network namespace meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from bench.processes import built
from socketprotector.launch.bind import bind_all
from socketprotector.launch.listen_spec import Listen
from socketprotector.system import bpf, reuseport
from socketprotector.system.listener import Listener
from socketprotector.system.listeners import listener_of


def _dropped() -> int:
    names, values, *_ = Path("/proc/net/netstat").read_text().splitlines()
    return int(dict(zip(names.split(), values.split(), strict=True))["TCPMinTTLDrop"])


def _pair(host: str) -> Listener:
    """Return a listener with two sockets."""
    [bound] = bind_all([Listen(f"{host}:0", port=0, host=host)], 400, notice=print)
    sibling = reuseport.make(bound.socket)
    assert sibling is not None
    first, second = bound.socket.detach(), sibling.detach()
    return listener_of(first, 0, bound.settings, shared=True, sibling=second)


def _serve(listener: Listener) -> None:
    listener.socket.setblocking(True)
    while True:
        client, _ = listener.socket.accept()
        with client:
            client.sendall(client.recv(64))


def main() -> None:
    """Print how often the third socket joined, and how many packets it dropped."""
    parser = argparse.ArgumentParser(prog="python -m bench.joins")
    parser.add_argument("seconds", nargs="?", type=float, default=12.0)
    parser.add_argument("host", nargs="?", default="127.0.0.1", help="an IPv4 address")
    given = parser.parse_args()
    listener = _pair(given.host)
    listener.steer(0)
    server = os.fork()
    if server == 0:
        _serve(listener)
    mark, count, before = bpf.Mark.draw(given.host), 0, _dropped()
    command = [built("load"), "-c", "8", "-t", str(given.seconds), f"127.0.0.1:{listener.port}"]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as load:
            until = time.monotonic() + given.seconds - 0.5
            while time.monotonic() < until:
                listener.steer(0, {mark: 1})
                listener.steer(0)
                count += 1
            seen = json.loads(load.communicate()[0])
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    print(
        f"{count} joins, {_dropped() - before} packets dropped, {seen['connections']} connections, "
        f"{seen['failed']} failed, slowest {seen['max_us'] / 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
