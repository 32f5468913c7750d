"""What the page costs: the exporter with 100 instances and 20 viewers, idle and busy.

    python -m bench.page [SECONDS]

The instances are stand-ins in this process: they cost what they are asked for, and the exporter
is measured alone.  docs/metrics.md has the figures.  Status 1: more than what was promised.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.processes import cpu_ticks, resident_kib

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
INSTANCES, VIEWERS, WORKERS = 100, 20, 4
#: What was promised: bytes; MB; while nothing changes, for each answer the CPU time that it takes
#: to parse so many of them, which is the same on any machine.
PAGE_BYTES, MEMORY_MB, PARSED = 50_000, 45.0, 60
PAGE = Path(__file__).parents[1] / "exporter" / "socketprotector_exporter" / "page"


class Instance:
    """Answers `events` and `status`; busy: each status says otherwise."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy = False
        self.asked = 0
        self._accepted = 1000

    def status(self) -> dict[str, Any]:
        if self.busy:
            self._accepted += 437
        buckets = [0] * 32
        buckets[8] = self._accepted
        worker = {"slot": 0, "pid": 4712, "state": "ready", "started_at": 1.0, "status": ""}
        workers = [
            {**worker, "number": number, "accepted": 9, "active": (self._accepted + number) % 5}
            for number in range(WORKERS)
        ]
        generation = {
            "number": 8,
            "phase": "serving",
            "opened_at": 1.0,
            "serving_since_at": 2.0,
            "path": "/srv/daemon",
            "queue": 0,
            "accepted": self._accepted,
            "active": 8,
            "wait_us": {"count": 1, "p50": 1, "p99": 1, "buckets": buckets},
            "workers": workers,
        }
        return {
            "name": self.name,
            "version": "0.9.0",
            "phase": "serving",
            "pid": 4711,
            "started_at": 1.0,
            "now": time.time(),
            "route": 8,
            "queue_limit": 278,
            "forwarded": self._accepted,
            "listeners": [{"address": "tcp:0.0.0.0:80"}],
            "generations": [generation],
            "reloads": [],
            "crashes": 0,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                self.asked += 1
                asked = json.loads(line)
                result = self.status() if asked["command"] == "status" else {}
                answer = {"v": 1, "id": asked["id"], "ok": True, "result": result}
                writer.write(json.dumps(answer).encode() + b"\n")
        except (OSError, asyncio.CancelledError):
            pass  # the end of the measurement
        finally:
            writer.close()


class Viewer:
    """Reads all that it is sent, and counts it."""

    def __init__(self) -> None:
        self.bytes = 0

    async def look(self, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while data := await reader.read(65_536):
            self.bytes += len(data)


async def main(seconds: float) -> list[str]:
    """Measure, and print a table; return what is more than was promised."""
    with tempfile.TemporaryDirectory(prefix="sp-") as folder:
        place = Path(folder) / "socketprotector"
        place.mkdir()
        instances = [Instance(f"shop-{number:02}") for number in range(INSTANCES)]
        for each in instances:
            await asyncio.start_unix_server(each.serve, place / f"{each.name}.control")
        chosen = [
            w for each in instances for w in ("--control", str(place / f"{each.name}.control"))
        ]
        words = ["--listen", "127.0.0.1:0", "--web", "127.0.0.1:0", *chosen]
        exporter = subprocess.Popen(
            [sys.executable, "-m", "socketprotector_exporter", *words],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert exporter.stderr is not None
            found = re.search(r"page at http://127.0.0.1:(\d+)", exporter.stderr.readline())
            assert found
            return await measure(exporter.pid, int(found[1]), instances, seconds)
        finally:
            exporter.terminate()
            exporter.wait()


def parse_s() -> float:
    """Return the CPU time that it takes here to parse a status: the least of some tries."""
    line, times = json.dumps(Instance("shop").status()), []
    for _ in range(20):
        began = time.thread_time()
        for _ in range(200):
            json.loads(line)
        times.append((time.thread_time() - began) / 200)
    return min(times)


async def measure(pid: int, port: int, instances: list[Instance], seconds: float) -> list[str]:
    over = []
    size = sum(path.stat().st_size for path in PAGE.iterdir())
    print(f"{'page':34} {size / 1000:6.1f} KB")
    if size > PAGE_BYTES:
        over.append(f"page: {size} bytes")
    viewers: list[Viewer] = []
    looking: list[asyncio.Task[None]] = []
    for name, many, busy in (
        ("nobody looks", 0, False),
        ("idle", VIEWERS, False),
        ("busy", VIEWERS, True),
    ):
        while len(viewers) < many:
            viewers.append(Viewer())
            looking.append(asyncio.create_task(viewers[-1].look(port)))
        for each in instances:
            each.busy = busy
        await asyncio.sleep(6)
        cpu, sent, asked = (
            cpu_ticks(pid),
            sum(v.bytes for v in viewers),
            sum(i.asked for i in instances),
        )
        await asyncio.sleep(seconds)
        used = (cpu_ticks(pid) - cpu) / TICKS_PER_S / seconds
        told = (sum(v.bytes for v in viewers) - sent) / seconds / max(1, many)
        memory_mb = resident_kib(pid) / 1024
        asks = (sum(i.asked for i in instances) - asked) / seconds
        share = used / asks / parse_s()
        print(
            f"{f'{name}: {len(instances)} instances, {many} viewers':34} {used:7.2%} of a core, "
            f"{memory_mb:.1f} MB, {told / 1000:.1f} KB/s each, {asks:.0f} asks/s, "
            f"{share:.0f} parses an ask"
        )
        if memory_mb > MEMORY_MB or (share >= PARSED and not busy):
            over.append(f"{name}: {share:.0f} parses an ask, {memory_mb:.1f} MB")
    for each_task in looking:
        each_task.cancel()
    return over


if __name__ == "__main__":
    given = sys.argv[1:]
    found = asyncio.run(main(float(given[0]) if given else 30.0))
    if found:
        sys.exit(f"more than was promised: {'; '.join(found)}")
