"""How probes reach a generation, and that they are never taken for clients: no socket, no process.

The kernel's filters are not here: tests/boundary/test_socket_steering.py.
"""

from __future__ import annotations

import errno
import socket
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from socketprotector.daemon.delivery.probe_target import ProbeTarget
from socketprotector.daemon.delivery.shared import probes as module
from socketprotector.daemon.delivery.shared.probes import LATE_ACCEPT_S, Probes
from socketprotector.system import bpf
from tests.unit.daemon.shared_world import MemoryListener, MemorySocket, SharedWorld, end

CLIENT = end("192.0.2.1")
NEIGHBOUR = end("127.0.0.1")  # a client of this machine


class World(SharedWorld):
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch, module)
        self.family = socket.AF_INET
        self.marks = iter(range(1, 10_000))
        self.closing: dict[MemorySocket, str] = {}
        self.waiting: set[Any] = set()  # our connections that wait, as the kernel knows them
        self.is_waiting_fails = 0
        calls = SimpleNamespace(
            Mark=SimpleNamespace(draw=self._draw),
            comes_from=bpf.comes_from,
            source_of_ipv6=bpf.source_of_ipv6,
        )
        patch.setattr(module, "bpf", calls)
        patch.setattr(module, "is_waiting", self._is_waiting)
        patch.setattr(module, "why_unreachable", lambda *_: "")
        patch.setattr(module, "end_of", lambda client, _: client.end)
        patch.setattr(module, "os", SimpleNamespace(fstat=lambda n: SimpleNamespace(st_ino=n)))
        snapshots = SimpleNamespace(closing=lambda one: self.closing.get(one, ""))
        patch.setattr(module, "socket_snapshot", snapshots)
        patch.setattr(module, "socket_copy", SimpleNamespace(device_of=lambda _: 0))
        self.probes = self.another()

    def another(self) -> Probes:
        """The probes of the next program, which has the record of this one."""
        made = Probes(self.listeners, self.turns, self.steering)
        if hasattr(self, "probes"):
            made.probed = set(self.probes.probed)
            made.probe_sources = set(self.probes.probe_sources)
        return made

    def _draw(self, host: str) -> bpf.Mark:
        number = next(self.marks)
        return bpf.Mark("::1", number) if ":" in host else bpf.Mark(f"127.9.9.{number}")

    def _is_waiting(self, client: Any, address: object, device: int) -> bool:
        if self.is_waiting_fails:
            raise OSError(self.is_waiting_fails, "no answer")
        return client.end in self.waiting

    def reach(self, generation: int, name: str = "", *knows: int) -> ProbeTarget | None:
        return self.probes.reach_by_mark(
            generation, name, knows.__contains__ if knows else lambda _: True
        )

    def probe(
        self, listener: MemoryListener, number: int, target: ProbeTarget | None, port: int = 1
    ) -> Any:
        """Have a probe come to a socket, and nobody accept it."""
        assert target is not None
        if listener.path:
            made: Any = SimpleNamespace(fileno=lambda: 1000 + port, end=1000 + port)
        else:
            source = target.mark.source if target.mark else ""
            made = SimpleNamespace(fileno=lambda: 0, end=end(source, port))
        listener.sockets[number].line.append(made.end)
        return made


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.fixture
def pair(world: World) -> MemoryListener:
    """Generation 1 serves at socket 0, and generation 2 starts at socket 1."""
    made = world.listener()
    world.serving(1)
    world.starting(2)
    return made


@pytest.fixture
def path(world: World) -> MemoryListener:
    made = world.listener(path="/run/s")
    world.serving(1)
    world.starting(2)
    return made


# -- the address of a probe --------------------------------------------------------------


def test_a_generation_is_reached_by_a_mark_that_is_steered_to_its_socket(
    world: World, pair: MemoryListener
) -> None:
    target = world.reach(2)
    assert target is not None
    assert target.address == pair.ensure_address(1)
    assert target.mark is not None
    assert world.probes.socket_by_mark == {target.mark: 1}
    assert world.steering.calls == [("steer",)]

    target.close()
    assert world.probes.socket_by_mark == {}
    assert len(world.steering.calls) == 2
    target.close()
    assert len(world.steering.calls) == 2


def test_the_source_of_probes_is_in_the_state_before_the_first_probe(
    world: World, pair: MemoryListener
) -> None:
    saves = world.clock.saves
    target = world.reach(2)
    assert target is not None
    assert target.mark is not None
    assert world.clock.saves == saves + 1
    assert world.probes.probe_sources == {(pair.index, 1, target.mark.source)}


def test_each_probe_of_several_generations_has_its_own_mark(
    world: World, pair: MemoryListener
) -> None:
    world.marks = iter([5, 5, 5, 6])
    one, two = world.reach(1), world.reach(2)
    assert one is not None
    assert two is not None
    assert one.mark != two.mark
    assert sorted(world.probes.socket_by_mark.values()) == [0, 1]


def test_at_a_path_it_is_reached_by_the_file_of_its_socket(
    world: World, path: MemoryListener
) -> None:
    target = world.reach(2)
    assert target is not None
    assert (target.address, target.mark) == (path.ensure_address(1), None)
    assert world.probes.probed == {(path.index, 1)}
    assert world.clock.saves == 1
    world.reach(2)
    assert world.clock.saves == 1, "it is in the state already"


def test_without_steering_the_old_generation_would_answer(
    world: World, pair: MemoryListener
) -> None:
    world.steering.succeeds = False
    with pytest.raises(BlockingIOError):
        world.reach(2)
    assert world.probes.socket_by_mark == {}
    assert world.probes.probe_sources == set()


def test_workers_that_are_finishing_might_answer_from_the_same_socket(
    world: World, pair: MemoryListener
) -> None:
    world.turns.leaving[9] = 1, world.clock.now
    with pytest.raises(BlockingIOError, match="may still accept"):
        world.reach(2)
    world.clock.pass_time(LATE_ACCEPT_S + 0.1)
    assert world.reach(2) is not None


@pytest.mark.parametrize(
    ("generation", "left", "is_fresh"),
    [(2, 0, False), (1, 1, False), (2, 1, True)],
    ids=["socket 0", "socket 1", "fresh"],
)
def test_workers_that_are_finishing_elsewhere_are_no_obstacle(
    world: World, pair: MemoryListener, generation: int, left: int, is_fresh: bool
) -> None:
    world.turns.leaving[9] = left, world.clock.now
    pair.is_fresh[1] = is_fresh
    assert world.reach(generation) is not None


def test_only_a_listener_that_the_generation_knows_is_probed(
    world: World, pair: MemoryListener
) -> None:
    second = world.listener()
    world.listener(count=1)
    found = world.reach(2, "", second.index)
    assert found is not None
    assert found.address == second.ensure_address(1)
    assert world.reach(2, "name0", second.index) is None
    assert world.reach(2, "name2") is None, "it has one socket for all generations"
    assert world.reach(7) is None, "there is no such generation"
    assert world.probes.can_probe("name1")
    assert not world.probes.can_probe("name2")
    second.lost = True
    assert not world.probes.can_probe("name1")


# -- what an answer counts for -----------------------------------------------------------


def test_an_answer_counts_while_the_address_leads_to_the_same_open_socket(
    world: World, pair: MemoryListener
) -> None:
    target = world.reach(2)
    assert target is not None
    assert target.is_unchanged()
    pair.sockets[1].listens = False
    assert not target.is_unchanged()
    pair.sockets[1].listens = True
    world.closing[pair.sockets[1]] = "device"
    assert not target.is_unchanged()


@pytest.mark.parametrize("how", ["replaced", "file of another program"])
def test_an_answer_of_another_socket_at_the_path_counts_for_nothing(
    world: World, path: MemoryListener, how: str
) -> None:
    target = world.reach(2)
    assert target is not None
    assert target.is_unchanged()
    if how == "replaced":
        path.identities[1] = (9, 9)
    else:
        path.sockets[1].is_unreachable = True
    assert not target.is_unchanged()


def test_workers_that_keep_clients_out_are_found_by_comparing_with_the_serving_ones(
    world: World, pair: MemoryListener
) -> None:
    target = world.reach(2)
    assert target is not None
    assert not target.may_refuse_clients()
    world.closing[pair.sockets[0]] = "device"
    assert target.may_refuse_clients()


def test_a_probe_waits_until_the_kernel_says_that_it_was_accepted(
    world: World, pair: MemoryListener
) -> None:
    target = world.reach(2)
    assert target is not None
    probe = world.probe(pair, 1, target)
    world.waiting.add(probe.end)
    assert target.waits(probe)
    world.waiting.clear()
    assert not target.waits(probe)


def test_without_sock_diag_it_waits_while_any_connection_does(
    world: World, pair: MemoryListener
) -> None:
    target = world.reach(2)
    assert target is not None
    world.is_waiting_fails = errno.EPROTONOSUPPORT
    probe = world.probe(pair, 1, target)
    assert target.waits(probe)
    pair.sockets[1].line.clear()
    assert not target.waits(probe)


def test_at_a_path_it_waits_while_it_is_in_the_queue_of_the_socket(
    world: World, path: MemoryListener
) -> None:
    target = world.reach(2)
    probe = world.probe(path, 1, target)
    assert target is not None
    assert target.waits(probe)
    path.sockets[1].line[:] = [7]
    assert not target.waits(probe)


def test_at_a_socket_that_was_shut_down_no_probe_waits(world: World, pair: MemoryListener) -> None:
    target = world.reach(2)
    assert target is not None
    pair.sockets[1].listens = False
    with pytest.raises(OSError, match="was shut down"):
        target.waits(any)  # type: ignore[arg-type]


# -- the serving generation, as clients reach it -----------------------------------------


def test_the_serving_generation_is_reached_as_clients_reach_it(
    world: World, pair: MemoryListener
) -> None:
    target = world.probes.reach_as_client("")
    assert target is not None
    assert target.address == pair.ensure_address(0)
    assert world.probes.socket_by_mark == {}, "the kernel steers it as a client"
    again = world.probes.reach_as_client("name0")
    assert again is not None
    assert again.mark == target.mark, "or the state would grow with each probe"
    assert world.clock.saves == 1
    assert world.probes.reach_as_client("other") is None
    assert world.probes.reach_as_client("", lambda _: False) is None
    pair.lost = True
    assert world.probes.reach_as_client("") is None


def test_a_listener_whose_interface_was_removed_is_probed_only_where_no_other_one_is(
    world: World, pair: MemoryListener
) -> None:
    world.serving(1)
    other = world.listener()
    for lacking, reached in ((other, pair), (pair, other)):
        other.lacks_interface, pair.lacks_interface = lacking is other, lacking is pair
        for target in (world.probes.reach_as_client(""), world.reach(1)):
            assert target is not None
            assert target.address == reached.ensure_address(0)
    named = world.probes.reach_as_client("name0")
    assert named is not None
    assert named.address == pair.ensure_address(0)


def test_at_a_path_it_has_no_mark(world: World, path: MemoryListener) -> None:
    target = world.probes.reach_as_client("")
    assert target is not None
    assert (target.address, target.mark) == (path.ensure_address(0), None)
    assert world.probes.probed == set(), "clients come there, too"


def test_where_the_path_leads_no_client_the_probe_goes_with_the_clients(
    world: World, path: MemoryListener
) -> None:
    path.path_fault = "its socket file was removed"
    target = world.probes.reach_as_client("")
    assert target is not None
    assert target.address == (path.path, 0)
    with pytest.raises(OSError, match="another program's socket"):
        target.waits(world.probe(path, 0, target))


# -- probes are no clients ---------------------------------------------------------------


@pytest.mark.parametrize("resumed", [False, True])
def test_abandoned_probes_of_a_failed_generation_are_discarded(
    world: World, pair: MemoryListener, resumed: bool
) -> None:
    target = world.reach(2)
    for port in range(3):
        world.probe(pair, 1, target, port)
    world.turns.leave(2, world.clock.now)
    if resumed:
        world.probes = world.another()
    assert not world.probes.clients_wait(pair, 1)  # type: ignore[arg-type]
    assert world.probes.discard() == set()
    assert pair.sockets[1].line == []
    assert world.probes.probe_sources == set()


@pytest.mark.parametrize("client", [CLIENT, NEIGHBOUR])
def test_a_client_among_them_is_never_discarded(
    world: World, pair: MemoryListener, client: bytes
) -> None:
    target = world.reach(2)
    world.probe(pair, 1, target)
    pair.sockets[1].line.append(client)
    world.turns.leave(2, world.clock.now)
    assert world.probes.clients_wait(pair, 1)  # type: ignore[arg-type]
    world.probes.discard()
    assert len(pair.sockets[1].line) == 2
    assert world.probes.probe_sources, "they may still be discarded later"


def test_without_probes_every_connection_is_a_client(world: World, pair: MemoryListener) -> None:
    assert not world.probes.clients_wait(pair, 1)  # type: ignore[arg-type]
    pair.sockets[1].line.append(NEIGHBOUR)
    assert world.probes.clients_wait(pair, 1)  # type: ignore[arg-type]


def test_probes_of_one_socket_say_nothing_about_the_other(
    world: World, pair: MemoryListener
) -> None:
    target = world.reach(2)
    world.probe(pair, 1, target)
    pair.sockets[0].line.append(CLIENT)
    world.turns.leave(1, world.clock.now)
    world.turns.leave(2, world.clock.now)
    assert world.probes.clients_wait(pair, 0)  # type: ignore[arg-type]
    world.probes.discard()
    assert pair.sockets[0].line == [CLIENT]
    assert pair.sockets[1].line == []


def test_sockets_from_which_workers_accept_are_left_alone(
    world: World, pair: MemoryListener
) -> None:
    world.probe(pair, 1, world.reach(2))
    world.probes.discard()
    assert len(pair.sockets[1].line) == 1


def test_a_socket_that_its_workers_lost_has_no_worker(world: World, pair: MemoryListener) -> None:
    world.probe(pair, 1, world.reach(2))
    world.turns.note_replaced(world.listeners.all[0], 1)
    world.probes.discard()
    assert pair.sockets[1].line == []


def test_once_discarded_later_connections_are_clients(world: World, path: MemoryListener) -> None:
    world.probe(path, 1, world.reach(2))
    world.turns.leave(2, world.clock.now)
    saves = world.clock.saves
    world.probes.discard()
    assert world.probes.probed == set()
    assert world.clock.saves == saves + 1, "the next program would discard clients of a hold"
    world.probes.discard()
    assert world.clock.saves == saves + 1
    path.sockets[1].line.append(5)
    assert world.probes.clients_wait(path, 1)  # type: ignore[arg-type]


def test_a_socket_that_its_owner_accepts_from_is_left_alone(world: World) -> None:
    passed_in = world.listener(foreign=True)
    world.serving(1)
    world.probe(passed_in, 0, world.reach(1))
    world.turns.leave(1, world.clock.now)
    world.turns.given_back = True
    world.probes.discard()
    assert len(passed_in.sockets[0].line) == 1


@pytest.mark.parametrize("lists", ["queue", "diag"])
@pytest.mark.parametrize(("code", "again"), [(errno.EMFILE, True), (errno.EINVAL, False)])
def test_a_queue_that_cannot_be_read_is_read_again_if_that_helps(
    world: World, pair: MemoryListener, lists: str, code: int, again: bool
) -> None:
    world.probe(pair, 1, world.reach(2))
    world.turns.leave(2, world.clock.now)
    setattr(world.kernel, f"{lists}_fails", code)
    assert world.probes.clients_wait(pair, 1)  # type: ignore[arg-type]
    assert world.probes.discard() == ({(pair.index, 1)} if again else set())
    assert len(pair.sockets[1].line) == 1


def test_probes_that_cannot_be_closed_now_stay_probes(world: World, pair: MemoryListener) -> None:
    world.probe(pair, 1, world.reach(2))
    world.turns.leave(2, world.clock.now)
    world.kernel.discard_fails = errno.EAGAIN
    assert world.probes.discard() == {(pair.index, 1)}
    assert not world.probes.clients_wait(pair, 1)  # type: ignore[arg-type]
    world.kernel.discard_fails = 0
    assert world.probes.discard() == set()
    assert pair.sockets[1].line == []


def test_abandoned_probes_of_the_serving_generation_are_none_either(
    world: World, pair: MemoryListener
) -> None:
    target = world.probes.reach_as_client("")
    probe = world.probe(pair, 0, target)
    assert target is not None
    target.abandon(probe)
    world.turns.leave(1, world.clock.now)
    assert not world.probes.clients_wait(pair, 0)  # type: ignore[arg-type]
    world.probes.discard()
    assert pair.sockets[0].line == []
    world.probes.probe_sources.clear()
    pair.sockets[0].line.append(probe.end)
    assert world.probes.clients_wait(pair, 0), "a number is used again"  # type: ignore[arg-type]


def test_after_they_were_discarded_the_next_probe_has_another_source(
    world: World, pair: MemoryListener
) -> None:
    before = world.probes.reach_as_client("")
    world.turns.leave(1, world.clock.now)
    world.probe(pair, 0, before)
    world.probes.discard()
    after = world.probes.reach_as_client("")
    assert before is not None
    assert after is not None
    assert before.mark != after.mark
    assert after.mark is not None
    assert world.probes.probe_sources == {(pair.index, 0, after.mark.source)}


def test_a_listener_with_one_socket_notes_no_abandoned_probe(world: World) -> None:
    world.listener(count=1)
    world.serving(1)
    target = world.probes.reach_as_client("")
    assert target is not None
    target.abandon(None)  # type: ignore[arg-type]


def test_abandoned_probes_at_a_path_are_known_by_inode(world: World, path: MemoryListener) -> None:
    target = world.probes.reach_as_client("")
    assert target is not None
    probe = world.probe(path, 0, target)
    target.abandon(probe)
    path.sockets[0].line.append(0)  # one whose connection is closed has none
    world.turns.leave(1, world.clock.now)
    assert not world.probes.clients_wait(path, 0)  # type: ignore[arg-type]
    path.sockets[0].line.append(77)
    assert world.probes.clients_wait(path, 0)  # type: ignore[arg-type]


def test_a_client_that_disconnected_at_another_path_is_no_probe(
    world: World, path: MemoryListener
) -> None:
    """Only where a probe was abandoned may a closed connection be one."""
    other = world.listener(path="/run/t")
    target = world.probes.reach_as_client("name0")
    assert target is not None
    target.abandon(world.probe(path, 0, target))
    other.sockets[0].line += [0, 0]
    world.probes.probed.add((other.index, 1))
    assert world.probes.clients_wait(other, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("resumed", [False, True])
def test_at_the_socket_of_a_probed_path_all_are_probes_until_clients_come(
    world: World, path: MemoryListener, resumed: bool
) -> None:
    target = world.reach(2)
    world.probe(path, 1, target)
    path.sockets[1].line.append(0)
    if resumed:
        world.probes = world.another()
    assert not world.probes.clients_wait(path, 1)  # type: ignore[arg-type]
    saves = world.clock.saves
    world.probes.clients_come({(path.index, 0)})
    assert world.clock.saves == saves
    world.probes.clients_come({(path.index, 1)})
    assert world.clock.saves == saves + 1
    assert world.probes.probed == set()
    assert world.probes.clients_wait(path, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["not steered", "client waits", "gets clients"])
def test_at_a_path_nothing_is_discarded_where_clients_may_have_come(
    world: World, path: MemoryListener, how: str
) -> None:
    if how == "client waits":
        path.sockets[1].line.append(5)
    if how == "gets clients":
        world.turns.expected[path.index] = 1
    world.steering.succeeds = how != "not steered"
    assert world.reach(2) is not None
    assert world.probes.probed == set()


def test_ipv6_probes_share_their_address_with_clients_of_this_machine(
    world: World, pair: MemoryListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "ensure_address", lambda _: ("::1", 8000))
    target = world.reach(2)
    assert target is not None
    assert target.mark is not None
    assert target.mark.family == socket.AF_INET6
    assert world.probes.probe_sources == set()
    assert world.probes.probed == {(pair.index, 1)}
    world.probe(pair, 1, target)
    assert not world.probes.clients_wait(pair, 1)  # type: ignore[arg-type]
    pair.sockets[1].line.append(end("2001:db8::1"))
    assert world.probes.clients_wait(pair, 1)  # type: ignore[arg-type]
    as_client = world.probes.reach_as_client("")
    assert as_client is not None
    assert world.probes.probed == {(pair.index, 1)}, "the serving one's peers may be clients"
    pair.sockets[1].line.clear()
    as_client.abandon(world.probe(pair, 0, as_client))
    assert not world.probes.clients_wait(pair, 0)  # type: ignore[arg-type]
    pair.sockets[0].line.append(end("::1", 7))
    assert world.probes.clients_wait(pair, 0)  # type: ignore[arg-type]


# -- counts ------------------------------------------------------------------------------


def waiting(world: World, generation: int, *, clients_only: bool = False) -> int | None:
    return world.probes.waiting(generation, lambda i: i != 99, clients_only=clients_only)


def test_clients_that_wait_are_counted_over_all_listeners_of_a_generation(
    world: World, pair: MemoryListener
) -> None:
    second = world.listener()
    path = world.listener(path="/run/s")
    pair.sockets[0].line += [CLIENT]
    second.sockets[0].line += [CLIENT, NEIGHBOUR]
    path.sockets[0].line += [7]
    pair.sockets[1].line += [NEIGHBOUR]
    assert (waiting(world, 1), waiting(world, 2), waiting(world, 7)) == (4, 1, 0)
    assert world.probes.waiting(1, lambda index: index == second.index) == 2


def test_where_only_probes_wait_no_client_does(world: World, pair: MemoryListener) -> None:
    second = world.listener()
    world.probe(pair, 1, world.reach(2))
    assert (waiting(world, 2), waiting(world, 2, clients_only=True)) == (1, 0)
    second.sockets[1].line.append(CLIENT)
    assert waiting(world, 2, clients_only=True) == 1
    pair.sockets[1].line.append(CLIENT)
    assert waiting(world, 2, clients_only=True) == 3


def test_at_a_socket_of_two_generations_it_is_unknown_for_which_a_client_waits(
    world: World,
) -> None:
    world.listener(count=1)
    world.serving(1)
    assert waiting(world, 1) == 0
    world.starting(2)
    assert waiting(world, 1) is None


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, ""), struct.error()])
def test_a_kernel_that_does_not_answer_leaves_the_number_unknown(
    world: World, pair: MemoryListener, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: object) -> tuple[int, int]:
        raise error

    monkeypatch.setattr(module, "reuseport", SimpleNamespace(queue=fail))
    assert waiting(world, 1) is None
