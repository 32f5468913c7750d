"""SampleClient: a small daemon that prints what it reads and sends it back.

    SampleClient PORT [STARTUP-PAUSE]

It serves many clients at once, with one thread each, and knows nothing of
reloads: `connections` ends when this worker gets no more, and Python waits
for the threads that are left.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

from socketprotector_client import connections

USAGE = "usage: SampleClient PORT [STARTUP-PAUSE]"


def echo(client: socket.socket) -> None:
    """Send each line back as `[pid] line`, until the client hangs up or says `quit`."""
    with client, client.makefile("rb") as lines:
        try:
            for line in lines:
                text = line.decode(errors="replace").rstrip("\r\n")
                # One write, so that lines of different clients never mix.
                print(text + "\n", end="", flush=True)
                if text == "quit":
                    break
                client.sendall(f"[{os.getpid()}] {text}\n".encode())
        except ConnectionError:
            pass  # the client hung up without a word


def main() -> int:
    """Run the command; return its exit status."""
    try:
        port, pause_s = sys.argv[1], float(sys.argv[2]) if sys.argv[2:] else 0.0
        if sys.argv[3:] or not 0 <= int(port) < 65536 or not 0 <= pause_s < 1e9:
            raise ValueError
    except (IndexError, ValueError):
        print(USAGE, file=sys.stderr)
        return 2

    time.sleep(pause_s)
    # Under the protector connections come from it; alone, from this port.
    try:
        for client, _ in connections(port):
            threading.Thread(target=echo, args=(client,)).start()
    except KeyboardInterrupt:
        pass  # Ctrl-C, where it runs alone
    except OSError as error:
        print(f"SampleClient: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
