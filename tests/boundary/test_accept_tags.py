"""Tags that accepted connections have from the socket that accepted them, and their count."""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon.delivery.shared.open_counts import NO_TAG, OpenCounts
from socketprotector.daemon.delivery.shared.shared_listeners import SharedListeners
from socketprotector.launch.bind_unix import give_away
from socketprotector.model.settings import ListenerSettings
from socketprotector.system import accept_tags, reuseport, sock_diag, socket_file
from socketprotector.system.listener import Listener
from socketprotector.system.listeners import listener_of
from tests.boundary.listening import KINDS, listening


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def accept(stack: ExitStack, one: socket.socket, host: str, count: int) -> list[socket.socket]:
    """Have so many clients accepted; return the server's ends."""
    found = []
    for _ in range(count):
        stack.enter_context(socket.create_connection((host, one.getsockname()[1])))
        found.append(stack.enter_context(one.accept()[0]))
    return found


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_what_two_sockets_of_an_address_have_accepted_is_told_apart(
    stack: ExitStack, family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    one = stack.enter_context(listening(family, host, both=both))
    assert accept_tags.tag_of(one) == 0
    accept(stack, one, hosts[0], 1)
    accept_tags.tag(one, 1)
    other = reuseport.make(one)
    assert other is not None
    stack.enter_context(other)
    assert (accept_tags.tag_of(one), accept_tags.tag_of(other)) == (1, 2)

    first = accept(stack, one, hosts[-1], 3)
    reuseport.steer(one, 1)
    accept(stack, other, hosts[0], 2)
    stack.enter_context(socket.create_connection((hosts[0], one.getsockname()[1])))  # waits

    counted = Counter({0: 1, 1: 3, 2: 2}), Counter({2: 1})
    assert accept_tags.connections(one) == accept_tags.connections(other) == counted
    first[0].close()
    first[1].shutdown(socket.SHUT_WR)
    assert accept_tags.connections(one)[0] == Counter({0: 1, 1: 2, 2: 2})


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_there_are_so_many_tags(family: int) -> None:
    with socket.socket(family) as one:
        for number in (*range(accept_tags.TAGS + 1), 0):
            accept_tags.tag(one, number)
            assert accept_tags.tag_of(one) == number


def test_those_at_another_address_of_the_port_are_not_counted(stack: ExitStack) -> None:
    one = stack.enter_context(listening(socket.AF_INET, "127.0.0.1"))
    other = stack.enter_context(socket.socket())
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    other.bind(("127.0.0.2", one.getsockname()[1]))
    other.listen()
    for each in (one, other):
        accept_tags.tag(each, 3)
    accept(stack, one, "127.0.0.1", 1)
    accept(stack, other, "127.0.0.2", 2)

    assert accept_tags.connections(one)[0] == Counter({3: 1})
    assert accept_tags.connections(other)[0] == Counter({3: 2})


class Kernel:
    """A kernel with given answers, and the time that each query takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.takes_s, self.queries = 100.0, 0.5, 0
        self.answers: list[dict[int, int]] = []  # of one listener after the other
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr(accept_tags, "connections", self.connections)

    def connections(
        self, listening: socket.socket, but: socket.socket | None = None
    ) -> tuple[Counter[int], Counter[int]]:
        self.now += self.takes_s
        self.queries += 1
        found = self.answers[(self.queries - 1) % len(self.answers)]
        if not found:
            raise OSError(errno.EOPNOTSUPP, "the kernel does not tell")
        return Counter(found), Counter()


@pytest.fixture
def two(stack: ExitStack) -> list[Listener]:
    """Two listeners, each with its sibling."""
    found = []
    for index in (0, 1):
        one = listening(socket.AF_INET, "127.0.0.1")
        other = reuseport.make(one)
        assert other is not None
        settings = ListenerSettings(f"tcp:127.0.0.1:{one.getsockname()[1]}")
        fds = one.detach(), other.detach()
        found.append(listener_of(fds[0], index, settings, shared=True, sibling=fds[1]))
        stack.callback(found[-1].close)
    return found


def counting(listeners: list[Listener]) -> OpenCounts:
    """The counts at these listeners; the process has no connection of its own."""
    host = SimpleNamespace(own_connection=None)
    return OpenCounts(SharedListeners(cast("Any", host), listeners))


def test_a_generation_has_what_has_its_tags_at_all_its_listeners(
    monkeypatch: pytest.MonkeyPatch, two: list[Listener]
) -> None:
    kernel = Kernel(monkeypatch)
    kernel.answers = [{1: 10, 2: 20, 0: 7}, {1: 1, 3: 3}]
    counts = counting(two)

    assert counts.active(((0, 1), (1, 3))) == 13
    assert counts.active(((0, 2),)) == 20
    assert counts.active(((0, 2), (1, 2))) == 20
    assert kernel.queries == 2


def test_what_is_not_known_is_none(monkeypatch: pytest.MonkeyPatch, two: list[Listener]) -> None:
    kernel = Kernel(monkeypatch)
    kernel.answers = [{1: 10}, {}]
    counts = counting(two)

    assert counts.active(()) is None
    assert counts.active(((0, 1), (1, 3))) is None
    assert counts.active(((0, 1), (2, 3))) is None  # that listener was removed
    assert counts.active(((0, 1),)) == 10


def test_the_kernel_is_asked_for_a_tenth_of_the_time_at_most(
    monkeypatch: pytest.MonkeyPatch, two: list[Listener]
) -> None:
    kernel = Kernel(monkeypatch)
    kernel.answers = [{1: 10}, {1: 5}]
    counts = counting(two)
    for _ in range(100):
        counts.active(((0, 1),))
        kernel.now += 1.0

    assert 16 <= kernel.queries <= 22  # both listeners, once in ten seconds


# -- whose connections are whose --------------------------------------------------------


def has(kernel: Kernel, *tags: int) -> None:
    """Let the kernel report open connections with these tags."""
    kernel.answers = [dict.fromkeys(tags, 1) or {0: 1}]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel that says that no connection is open."""
    made = Kernel(monkeypatch)
    has(made)
    return made


@pytest.fixture
def counts(two: list[Listener]) -> OpenCounts:
    """Those of a single listener."""
    return counting(two[:1])


def test_each_generation_has_a_tag_of_its_own(kernel: Kernel, counts: OpenCounts) -> None:
    first = counts.tag_sockets(0, ())
    second = counts.tag_sockets(1, first)
    again = counts.tag_sockets(0, second)
    third = counts.tag_sockets(1, {*second, *again})

    assert len({*first, *second, *again, *third}) == 4
    assert kernel.queries == 1


def test_most_reloads_query_nothing(kernel: Kernel, counts: OpenCounts) -> None:
    """One query finds several unused tags, which the next reloads use."""
    serving = counts.tag_sockets(0, ())
    for generation in range(1, 21):
        has(kernel, serving[0][1])
        new = counts.tag_sockets(generation % 2, serving)
        assert new not in (serving, ((0, NO_TAG),))
        serving = new

    assert kernel.queries <= 1 + 20 / 3


def test_a_tag_that_a_socket_had_for_a_moment_is_not_unused(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, counts: OpenCounts
) -> None:
    first, tag = counts.tag_sockets(0, ()), accept_tags.tag
    with monkeypatch.context() as patch:
        patch.setattr(accept_tags, "tag", lambda *given: tag(*given) | {4, 5})
        second = counts.tag_sockets(1, first)
    kernel.answers = [{}]  # from now on each query fails, so only remembered tags are left
    later = {counts.tag_sockets(number % 2, {*first, *second})[0][1] for number in range(7)}

    assert NO_TAG in later
    assert later.isdisjoint({4, 5, first[0][1], second[0][1]})
    assert len(later) > 2


def test_a_socket_keeps_its_tag_while_a_client_waits_there(
    kernel: Kernel, counts: OpenCounts, two: list[Listener]
) -> None:
    """With another tag, that client would be counted for no generation."""
    first = counts.tag_sockets(0, ())
    second = counts.tag_sockets(1, first)
    with socket.create_connection(two[0].socket.getsockname()):
        assert counts.tag_sockets(0, second) == first
    assert kernel.queries == 2


@pytest.mark.usefixtures("kernel")
def test_a_tag_that_a_socket_has_already_is_not_chosen(
    counts: OpenCounts, two: list[Listener]
) -> None:
    counts.tag_sockets(0, ())
    for tag in range(1, accept_tags.TAGS + 1):
        accept_tags.tag(two[0].sockets[1], tag)
        accept_tags.tag(two[0].sockets[0], tag % accept_tags.TAGS + 1)

        ((_, chosen),) = counts.tag_sockets(0, ())
        assert chosen != tag


def test_after_an_error_no_tag_is_known_to_be_unused(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, counts: OpenCounts
) -> None:
    """The options are set one by one, so the socket may have had any tag."""
    first = counts.tag_sockets(0, ())

    def fails(*_: object) -> None:
        raise OSError(errno.ENOBUFS, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(accept_tags, "tag", fails)
        assert counts.tag_sockets(1, first) == ()
    counts.tag_sockets(1, first)

    assert kernel.queries == 2


@pytest.mark.usefixtures("kernel")
def test_where_a_client_of_another_one_waits_nothing_is_known(
    counts: OpenCounts, two: list[Listener]
) -> None:
    first = counts.tag_sockets(0, ())
    with socket.create_connection(two[0].socket.getsockname()):
        assert counts.tag_sockets(0, first) == ()


@pytest.mark.usefixtures("kernel")
def test_the_next_program_finds_the_same_where_a_client_of_another_one_waits(
    counts: OpenCounts, two: list[Listener]
) -> None:
    """The first was killed before it had written down that nothing is known any more."""
    first = counts.tag_sockets(0, ())
    with socket.create_connection(two[0].socket.getsockname()):
        assert counts.tag_sockets(0, first) == ()

        assert counts.tag_sockets(0, first) == ()


def test_with_a_socket_that_all_share_nothing_is_known(two: list[Listener]) -> None:
    two[0].drop_socket(1)

    assert counting(two).tag_sockets(1, ()) == ()


def test_at_a_path_none_is_counted_for_a_generation_that_another_one_has_accepted(
    tmp_path: Path,
) -> None:
    """Of that nothing is known any more, and the next one has its socket."""
    path = str(tmp_path / "s")
    first, second = (
        socket_file.bind(path, 8, socket_file.Rights(-1, -1, 0o600), give_away) for _ in "12"
    )
    socket_file.lead_to(path, first, [first, second])
    settings = ListenerSettings(f"unix:{path}", 1, os.lstat(path).st_ino)
    its = listener_of(first.detach(), 0, settings, shared=True, sibling=second.detach())
    counts = counting([its])
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        accepted, _ = its.socket.accept()
        with accepted:
            assert counts.tag_sockets(0, ()) == ()
            assert counts.tag_sockets(1, ()) == ((0, sock_diag.file_key(its.socket_for(1))),)
    assert counts.tag_sockets(0, ()) == ((0, sock_diag.file_key(its.socket)),)
    its.close()


def test_with_too_many_generations_no_more_is_known_of_the_last(counts: OpenCounts) -> None:
    """And the others are not forgotten, as with ()."""
    taken = {(0, tag) for tag in range(1, accept_tags.TAGS + 1)}
    tags = counts.tag_sockets(0, taken)

    assert tags == ((0, NO_TAG),)
    assert counts.active(tags) is None
    assert counts.tag_sockets(1, tags) not in ((), tags), "the next one is known again"


def test_a_tag_of_which_connections_are_open_is_nobody_elses(
    stack: ExitStack, counts: OpenCounts, two: list[Listener]
) -> None:
    """A generation may be gone, or more than there are tags: each has a client for ever."""
    its = two[0]
    known: list[tuple[tuple[int, int], ...]] = []
    for generation in range(64):
        number = generation % 2
        tags = counts.tag_sockets(number, ())  # whose tags are taken is not known any more
        its.steer(number)
        stack.enter_context(socket.create_connection(its.socket.getsockname()))
        stack.enter_context(its.socket_for(number).accept()[0])
        known.append(tags)
    counts._next_query_at = 0.0

    assert [counts.active(tags) for tags in known] == [1] * 7 + [None] * 57


def test_a_generation_that_begins_while_the_kernel_does_not_tell_takes_nothing_from_others(
    kernel: Kernel, counts: OpenCounts, two: list[Listener]
) -> None:
    """There may be no descriptor to ask it with, for that moment."""
    first = counts.tag_sockets(0, ())
    kernel.answers = [{}]
    upgraded = counting(two[:1])
    second = upgraded.tag_sockets(1, first)
    again = upgraded.tag_sockets(0, {*first, *second})
    has(kernel, *(tag for _, tag in first))

    assert second == again == ((0, NO_TAG),)
    assert [upgraded.active(tags) for tags in (first, second, again)] == [1, None, None]


def test_whose_client_waits_is_not_known_where_only_the_gone_had_that_tag(
    kernel: Kernel, counts: OpenCounts, two: list[Listener]
) -> None:
    first = counts.tag_sockets(0, ())
    second = counts.tag_sockets(1, first)
    has(kernel, *(tag for _, tag in first))  # a connection of the first is left
    with socket.create_connection(two[0].socket.getsockname()):
        assert counts.tag_sockets(0, second) == ((0, NO_TAG),)


def test_one_that_came_between_two_options_is_counted_for_no_generation(
    kernel: Kernel, counts: OpenCounts, two: list[Listener]
) -> None:
    accept_tags.tag(two[0].socket, 1)
    has(kernel, 1)  # the generation of tag 1 has gone
    taken = {(0, its) for its in (2, 3, 4, 5, 7)}
    with socket.create_connection(two[0].socket.getsockname()):
        assert counts.tag_sockets(0, taken) == (), "on the way from 1 to 6 it has one of the others"


def test_on_its_way_a_socket_has_no_tag_that_is_anothers_if_it_can_be(stack: ExitStack) -> None:
    one = stack.enter_context(listening(socket.AF_INET, "127.0.0.1"))
    accept_tags.tag(one, 3)

    assert accept_tags.tag(one, 0, {2}) == {3, 1}
    accept_tags.tag(one, 3)
    assert accept_tags.tag(one, 0, {1}) == {3, 2}
    assert accept_tags.tag(one, 0) == set()
    assert accept_tags.tag(one, 7, {1, 2, 3, 4, 6}) & {1, 2, 3, 4, 6}
    assert accept_tags.tag_of(one) == 7


def test_one_that_no_process_has_open_any_more_does_not_wait(stack: ExitStack) -> None:
    """It waits for its client's end, for up to a minute, and has no options any more."""
    one = stack.enter_context(listening(socket.AF_INET, "127.0.0.1"))
    accept_tags.tag(one, 3)
    for accepted in accept(stack, one, "127.0.0.1", 2):
        accepted.close()
    stack.enter_context(socket.create_connection(one.getsockname()))  # waits
    ended = stack.enter_context(socket.create_connection(one.getsockname()))  # so does this
    ended.shutdown(socket.SHUT_WR)

    assert accept_tags.connections(one) == (Counter(), Counter({3: 2}))


def test_the_tag_of_clients_that_wait_elsewhere_is_given_to_none(
    stack: ExitStack, counts: OpenCounts, two: list[Listener]
) -> None:
    """Who accepts them has it then: a generation that was started for them."""
    its = two[0]
    first = counts.tag_sockets(0, ())
    stack.enter_context(socket.create_connection(its.socket.getsockname()))
    assert counts.tag_sockets(0, first) == ()  # for him; and it is not known whose tag that is

    upgraded = counting(two[:1])  # remembers no unused tags
    found = upgraded.tag_sockets(1, {(0, accept_tags.tag_of(its.sockets[1]))})

    assert found
    assert not set(found) & set(first)
