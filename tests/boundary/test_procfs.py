"""What is read of processes in /proc."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest

from socketprotector.system.procfs import sockets_of
from socketprotector.system.sock_diag import address_of


def test_an_address_is_known_on_which_one_of_several_processes_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = 2**22 + 1  # no process has this number

        found = address_of(sockets_of([gone, os.getpid()]))

        assert found is not None
        inode = os.fstat(server.fileno()).st_ino
        assert address_of({inode}) == f"127.0.0.1:{server.getsockname()[1]}"


def test_the_sockets_of_each_process_are_found() -> None:
    ours, theirs = socket.socketpair()
    with ours, subprocess.Popen(["cat"], stdin=theirs.fileno()) as other:
        wanted = {os.fstat(each.fileno()).st_ino for each in (ours, theirs)}
        theirs.close()

        found = sockets_of([os.getpid(), other.pid])

        ours.close()
    assert wanted <= found


def test_of_processes_with_many_descriptors_so_many_are_looked_at_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The resident process asks: new clients would wait for as long as that takes."""
    looked: list[str] = []
    real = os.readlink

    def readlink(path: str) -> str:
        looked.append(path)
        return real(path)

    monkeypatch.setattr(os, "readlink", readlink)
    pairs = [socket.socketpair() for _ in range(5)]

    sockets_of([os.getpid()] * 3, 4)

    for pair in pairs:
        for each in pair:
            each.close()
    assert len([each for each in looked if "/fd/" in each]) == 4
