"""A SocketServer and its children: forked by `run`, by hand, or by multiprocessing."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys

from socketprotector_client import SocketServer
from socketprotector_client.worker import current

from tests.client.programs.talk import say, talk


def by_hand(addresses: list[str]) -> None:
    """Several servers, one child each; the parent waits for a signal or for the children."""
    servers = [SocketServer(address) for address in addresses]

    def close(signum: int, frame: object) -> None:
        for server in servers:
            server.close()

    signal.signal(signal.SIGTERM, close)
    for server in servers:
        if not os.fork():
            server.client(talk)
            say("child ended")
            os._exit(0)
    say(" ".join(name for server in servers for name in server.listeners))
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break


def by_multiprocessing(address: str, method: str) -> None:
    context = multiprocessing.get_context(method)
    with SocketServer(address) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.close())
        process = context.Process(target=server.client, args=(talk,))  # type: ignore[attr-defined]
        process.start()
        say(" ".join(server.listeners))
        process.join()
        say(f"child ended {process.exitcode}")


def until_usr1() -> None:
    """Be ready without a child, until the signal."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    current().ready(takes=False)
    signal.sigwait({signal.SIGUSR1})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def main() -> None:
    logging.basicConfig()
    way, *rest = sys.argv[1:]
    if way == "by hand":
        by_hand(rest)
    elif way == "multiprocessing":
        by_multiprocessing(*rest)
    elif way == "twice":
        SocketServer(rest[0])
        SocketServer(rest[1])
    else:
        children, queue, *addresses = rest
        with SocketServer(addresses, queue=int(queue)) as server:
            say(" ".join(server.listeners))
            if children == "0":
                until_usr1()
            if children == "early":  # a USR1 before `run` handles it, as in shared_queue.py
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
                os.kill(os.getpid(), signal.SIGUSR1)
            server.run(talk, int(children) if children.isdigit() and children != "0" else 1)
    say("ended")


if __name__ == "__main__":
    main()
