"""Clients of the balancer, in its network: `load.py PORT PER_SECOND`.

At each line on stdin it says in one line of JSON what has come of all requests so far; it ends with
its stdin.
"""

from __future__ import annotations

import json
import sys

from bench.rolling import Clients


def main() -> None:
    port, per_second = int(sys.argv[1]), float(sys.argv[2])
    with Clients(port, per_second=per_second) as clients:
        for _ in sys.stdin:
            told = {
                "answered": clients.answered,
                "failures": list(clients.failures),
                "longest_s": clients.longest_s,
            }
            print(json.dumps(told), flush=True)


main()
