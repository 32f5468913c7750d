"""An event loop's epoll beside an intake's: the loop gets the events of both, and no others."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from types import SimpleNamespace

from socketprotector_client.intake import Intake
from socketprotector_client.shared_epoll import BesideEpoll


def test_a_loop_gets_the_events_of_its_own_descriptors_and_of_the_queue(intake: Intake) -> None:
    ours, theirs = socket.socketpair()
    with select.epoll() as epoll, ours, theirs:
        loop = SimpleNamespace(epoll=epoll)
        BesideEpoll.put(loop, "epoll", intake, intake.fileno())
        beside = loop.epoll
        assert isinstance(beside, BesideEpoll)
        beside.register(ours.fileno(), select.EPOLLIN)
        beside.register(intake.fileno(), select.EPOLLIN)
        assert beside.poll(0) == []

        theirs.send(b"!")
        assert beside.poll(10) == [(ours.fileno(), select.EPOLLIN)]
        with socket.create_connection(intake.source.sockname):
            both = {(ours.fileno(), select.EPOLLIN), (intake.fileno(), select.EPOLLIN)}
            while set(beside.poll(10)) != both:
                pass
            beside.unregister(intake.fileno())
            assert beside.poll(10) == [(ours.fileno(), select.EPOLLIN)]
            assert beside.fileno() == epoll.fileno()

        BesideEpoll.take_back(loop, "epoll", intake)
        assert loop.epoll is epoll


def test_a_loop_that_asks_for_one_event_gets_it_once(intake: Intake) -> None:
    with select.epoll() as epoll:
        beside = BesideEpoll(epoll, intake, intake.fileno())
        beside.register(intake.fileno(), select.EPOLLIN | select.EPOLLONESHOT)
        with socket.create_connection(intake.source.sockname):
            assert beside.poll(10) == [(intake.fileno(), select.EPOLLIN)]
            assert beside.poll(0) == []
            beside.modify(intake.fileno(), select.EPOLLIN | select.EPOLLONESHOT)
            assert beside.poll(10) == [(intake.fileno(), select.EPOLLIN)]


def test_a_loop_that_has_no_such_epoll_stays_as_it_is(intake: Intake) -> None:
    other = object()
    loop = SimpleNamespace(epoll=other)

    BesideEpoll.put(loop, "epoll", intake, intake.fileno())
    BesideEpoll.put(loop, "nothing", intake, intake.fileno())

    assert vars(loop) == {"epoll": other}


def test_two_listeners_in_one_loop_both_get_their_events(
    intake: Intake, make_intake: Callable[[], Intake]
) -> None:
    """The first has the loop sleep in its own; the second is reported as before."""
    second = make_intake()
    with select.epoll() as epoll:
        loop = SimpleNamespace(epoll=epoll)
        BesideEpoll.put(loop, "epoll", intake, intake.fileno())
        first = loop.epoll
        BesideEpoll.put(loop, "epoll", second, second.fileno())
        assert loop.epoll is first
        for each in (intake, second):
            loop.epoll.register(each.fileno(), select.EPOLLIN)
        with socket.create_connection(second.source.sockname):
            assert loop.epoll.poll(10) == [(second.fileno(), select.EPOLLIN)]
