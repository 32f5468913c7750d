"""A TCP listener and the model of its group: a sample of sequences against the real kernel."""

from __future__ import annotations

import os
import random
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from socketprotector.launch.bind import bind_all
from socketprotector.launch.listen_spec import Listen
from socketprotector.system import bpf, reuseport, sock_diag
from socketprotector.system.listener import Listener
from socketprotector.system.listeners import listener_of
from socketprotector.system.reuseport_group import OTHER, SILENT
from tests.namespaces import two_links
from tests.rounds import rounds
from tests.running import DEADLINE_S
from tests.unit.system.reuseport_group_model import DRAWN, EVENTS, OF_WORKERS, World

SEQUENCES = rounds(20, 60)
#: A share, in ten thousandths.
HALF = 5_000
LOCK_FILTER = 44
#: A client that gets an answer on this machine has it before connect(2) returns; but on a busy one
#: it may take this long.
SOON_S = 0.02


class Address:
    """A listener with two sockets, to which happens what happens to the model."""

    def __init__(self, host: str) -> None:
        listen = f"[{host}]:0" if ":" in host else f"{host}:0"
        [bound] = bind_all([Listen(listen, port=0, host=host)], 40, notice=print)
        self.target, self.settings = bound.socket.getsockname(), bound.settings
        second = reuseport.make(bound.socket)
        assert second is not None
        self.listener: Listener = listener_of(
            bound.socket.detach(), 0, self.settings, shared=True, sibling=second.detach()
        )
        self.mark = bpf.Mark.draw(host)
        self.model = World()
        self.model.is_killed = False
        self.steer()

    def happens(self, name: str) -> None:
        EVENTS[name](self.model)
        what, _, words = name.rpartition(" ")
        if name == "restart":
            self.restart()
        elif name == "mend":
            for number in (0, 1):
                if not self.listener.is_alive(number):
                    assert self.listener.listen_again(number)
                    self.steer()
        elif what:
            self.happens_to(what, int(words))
        if name not in OF_WORKERS:
            self.steer()
            self.check()

    def happens_to(self, what: str, number: int) -> None:
        one = self.listener.socket_for(number)
        match what:
            case "shut":
                if self.listener.is_alive(number):
                    one.shutdown(socket.SHUT_RDWR)
            case "listen":
                one.listen(40)
            case "lock":
                one.setsockopt(socket.SOL_SOCKET, LOCK_FILTER, 1)
            case "renew":
                assert self.listener.listen_again(number)
            case "bind anew":
                self.listener.bind_anew(number)

    def restart(self) -> None:
        """Have another listener for copies of the descriptors."""
        before = self.listener
        fds = [os.dup(fd) for fd in before.descriptors().values()]
        first, second, reserved = [*fds, -1][:3]
        self.listener = listener_of(
            first, 0, self.settings, shared=True, sibling=second, reserved=reserved
        )
        for fd in before.descriptors().values():
            os.close(fd)
        for each in before.sockets:
            each.detach()
        if before._reserved is not None:
            before._reserved.detach()

    def steer(self) -> None:
        model = self.model
        marked = dict.fromkeys((self.mark,), 1 - model.serving) if model.asked else {}
        try:
            share = HALF if model.shared else 0
            self.listener.steer(model.serving, marked, held=model.held, share=share)
        except OSError:
            assert not model.kernel.socks

    def check(self) -> None:
        model = self.model
        found = sock_diag.listening(self.listener.socket.family, self.target[1])
        inodes = {
            os.fstat(self.listener.socket_for(number).fileno()).st_ino: number for number in (0, 1)
        }
        numbers = [inodes.get(each, SILENT) for each in found]
        assert numbers == model.kernel.listed, "the model and the kernel differ"
        for of in (None, "mark") if model.asked else (None,):
            can = model.kernel.select(of) or {OTHER}
            if of is None and model.shared:
                can |= model.kernel.select(DRAWN)
            for _ in range(2):
                came = self.comes_to(of is not None)
                assert came in can, f"{of} comes to {came}, not to {can}"

    def comes_to(self, marked: bool) -> int:
        """Connect; return to which of the two, or SILENT: no answer, or OTHER: it is refused."""
        with socket.socket(self.listener.socket.family) as client:
            client.setblocking(False)
            if marked:
                self.mark.put(client)
            client.connect_ex(self.target)
            silent = SILENT in self.model.kernel.socks
            if not select.select([], [client], [], SOON_S if silent else DEADLINE_S)[1]:
                return SILENT
            if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return OTHER
            alive = [n for n in (0, 1) if self.listener.is_alive(n)]
            there = [self.listener.socket_for(number) for number in alive]
            ready = select.select(there, [], [], SOON_S if silent else DEADLINE_S)[0]
            if silent and not ready:
                return SILENT  # without CAP_NET_ADMIN it has room for one with the most hops
            [one] = ready
            one.accept()[0].close()
            return alive[there.index(one)]

    def close(self) -> None:
        self.listener.close()
        for each in self.listener.sockets:
            each.close()


@contextmanager
def address(host: str) -> Iterator[Address]:
    made = Address(host)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(params=["127.0.0.1", "::1", "link-local"])
def host(request: pytest.FixtureRequest) -> Iterator[str]:
    with ExitStack() as links:
        is_known = request.param != "link-local"
        yield request.param if is_known else links.enter_context(two_links())[0]


def test_the_next_program_knows_the_order_that_a_foreign_member_left(host: str) -> None:
    with address(host) as one:
        listener = one.listener
        foreign = reuseport.make(listener.socket)
        assert foreign is not None
        with foreign:
            one.steer()
            listener.socket_for(0).shutdown(socket.SHUT_RDWR)
            assert listener.listen_again(0)
            listener.steer(0, held=True)  # the foreign member has the first position
        one.steer()
        record = listener.group_record
        assert record == ((1, 0), (0, 1))

        one.restart()
        one.listener.group_record = record
        one.steer()

        assert one.comes_to(marked=False) == 0


def test_the_kernel_does_as_its_model(host: str) -> None:
    for seed in range(SEQUENCES):
        pick, so_far = random.Random(seed), []
        with address(host) as one:
            try:
                for _ in range(6):
                    so_far.append(pick.choice(list(EVENTS)))
                    one.happens(so_far[-1])
                one.happens("mend")
            except Exception as error:
                raise AssertionError(f"{so_far}: {error}") from error
