"""What the programs here have in common: their options and what they answer."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from typing import Any

from socketprotector_client import draining, listener_of, on_drain


def options() -> argparse.Namespace:
    logging.basicConfig()
    parser = argparse.ArgumentParser()
    parser.add_argument("--address")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--announce", action="store_true", help="say when the drain begins")
    parser.add_argument("--hectic", action="store_true", help="switch threads all the time")
    parsed = parser.parse_args()
    if parsed.hectic:
        sys.setswitchinterval(1e-6)
    if parsed.announce:
        on_drain(lambda: say("drain begun"))
    return parsed


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def answer(line: str, connection: Any) -> str:
    """The answer to one line of a client; the line `fail` raises."""
    if line == "fail":
        raise RuntimeError("asked to fail")
    known = {"pid": os.getpid(), "listener": listener_of(connection), "draining": draining()}
    return str(known.get(line, f"echo {line}"))


def talk(connection: socket.socket, peer: object = None) -> None:
    with connection, connection.makefile("rw", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            lines.write(answer(line.rstrip("\n"), connection) + "\n")
            lines.flush()
