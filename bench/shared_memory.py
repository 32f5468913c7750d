"""Memory of one large application in many processes: forked children beside separate workers.

python -m bench.shared_memory [WAY ...]: PSS when serving after 3,000 requests, the time of the
start against one load of the application, the peak of PSS at a reload, requests per second, and
the time from the death of a process to the fork of the next one (median; a pid of the parent's).
The application has about 100 MB of modules, classes and 600,000 objects.  Requests touch a
contiguous tenth of the objects (REQUEST=random: scattered ones), and every 20th collects garbage.
REQUESTS=100000: so many requests.  FREEZE=no: the parent does not freeze its objects.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

COUNT, REQUESTS, CLIENTS, KILLS = 8, 3000, 4, 11
APP = """
import gc, os, random
def methods():
    return {f"m{k}": (lambda self, k=k: k) for k in range(8)}
made = [type(f"Class{n}", (), methods()) for n in range(5000)]
class Row:
    def __init__(self, n):
        self.n, self.name = n, str(n)
rows = [Row(n) for n in range(300_000)]  # with their names 600,000 objects
is_random = os.environ.get("REQUEST") == "random"
some = random.Random(1).sample(rows, 30_000) if is_random else rows[:30_000]
if os.environ.get("FREEZE") == "no":
    gc.freeze = lambda: None
served = 0
def app(environ, start_response):
    global served
    served += 1
    # The same tenth for all requests, the hot part of a table: 30 requests touch it all.
    total = sum(row.n + len(row.name) for row in some[served % 30 :: 30])
    if served % 20 == 0:
        gc.collect()
    body = b"%d" % total
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""
BIN = Path(sys.executable).parent
RUN = (sys.executable, "-m", "socketprotector_client.run")
GUNICORN = (str(BIN / "gunicorn"), "--workers", str(COUNT), "--no-control-socket", "--preload")
#: Name -> the protector's options and the command.
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "separate": (("--workers", str(COUNT)), (*RUN, "--threads", "1", "big:app")),
    "processes": ((), (*RUN, "--threads", "1", "--processes", str(COUNT), "big:app")),
    "gunicorn": (("--handoff", "listener", "--ready", "notify"), (*GUNICORN, "big:app")),
}


def session_pss(protector: int) -> int:
    """Return the sum of PSS of all processes of the protector's workers, in KiB."""
    total, leaders = 0, {protector}
    found = {int(name): _stat(name) for name in os.listdir("/proc") if name.isdigit()}
    for parent, session in found.values():
        if parent == protector:
            leaders.add(session)
    for pid, (_, session) in found.items():
        if session in leaders - {protector}:
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += int(text.partition("\nPss:")[2].split()[0])
            except (OSError, IndexError):
                pass
    return total


def _stat(name: str) -> tuple[int, int]:
    try:
        words = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        return int(words[1]), int(words[3])
    except OSError:
        return 0, 0


def ask(port: int, count: int) -> None:
    """Ask on connections of their own, so that all processes get requests."""
    for _ in range(count):
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        line.request("GET", "/", headers={"Connection": "close"})
        line.getresponse().read()
        line.close()


def load(port: int, count: int) -> float:
    """Return the requests per second of several clients."""
    began = time.monotonic()
    threads = [threading.Thread(target=ask, args=(port, count // CLIENTS)) for _ in range(CLIENTS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return count / (time.monotonic() - began)


def respawn_ms(protector: int) -> float:
    """Return the median time from a child's death to the next child, in milliseconds.

    nan if the workers have no children.
    """
    [parent, *others] = [pid for pid in children(protector) if children(pid)] or [0]
    if not parent or others:
        return float("nan")
    found = []
    for _ in range(KILLS):
        before = set(children(parent))
        began = time.monotonic()
        os.kill(min(before), signal.SIGKILL)
        while not set(children(parent)) - before:
            time.sleep(0.0005)
        found.append((time.monotonic() - began) * 1000)
    return sorted(found)[KILLS // 2]


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def measure(way: str, folder: Path, port: int, requests: int) -> dict[str, float]:
    options, command = WAYS[way]
    control = folder / f"{way}.control"
    env = {**os.environ, "PYTHONPATH": f"{folder}:{Path(__file__).parents[1] / 'client_lib'}"}
    words = [str(BIN / "SocketProtector"), "-f", "--name", way, "--control", str(control)]
    words += [*options, f"127.0.0.1:{port}", "--", *command]
    began = time.monotonic()
    with (folder / f"{way}.log").open("wb") as log:
        protector = subprocess.Popen(words, env=env, cwd=folder, stderr=log, stdout=log)
    try:
        while b"event=ready" not in (folder / f"{way}.log").read_bytes():
            assert protector.poll() is None
            time.sleep(0.01)
        start_s = time.monotonic() - began
        rate = load(port, requests)
        serving = session_pss(protector.pid)
        ctl = [str(BIN / "socketprotectorctl"), "--control", str(control), "reload"]
        peak = serving
        quiet = subprocess.DEVNULL
        with subprocess.Popen(ctl, stdout=quiet, stderr=quiet) as reload:
            while reload.poll() is None:
                peak = max(peak, session_pss(protector.pid))
                time.sleep(0.02)
        respawn = respawn_ms(protector.pid)
    finally:
        protector.send_signal(signal.SIGTERM)
        protector.wait(60)
    return {
        "start_s": start_s,
        "pss_mb": serving / 1000,
        "peak_mb": peak / 1000,
        "per_s": rate,
        "respawn_ms": respawn,
    }


def main() -> None:
    ways = sys.argv[1:] or [*WAYS]
    requests = int(os.environ.get("REQUESTS", REQUESTS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "big.py").write_text(APP)
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import big"], cwd=folder, check=True)
        print(f"one load: {time.monotonic() - began:.2f} s")
        for number, way in enumerate(ways):
            found = measure(way, folder, 18800 + number, requests)
            print(way, {key: round(value, 2) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
