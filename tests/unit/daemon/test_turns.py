"""Which generation accepts from which socket, as a value."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

from socketprotector.daemon.delivery.shared.turns import Share, Turns
from tests.rounds import rounds

PAIR = cast("Any", SimpleNamespace(index=0, sockets=(1, 2), has_sibling=True, path="/s"))
PAIR.settings = SimpleNamespace(foreign=False)
ONE = cast("Any", SimpleNamespace(index=1, sockets=(1,), has_sibling=False, path=""))
ONE.settings = SimpleNamespace(foreign=False)
BOTH = (PAIR, ONE)


def enter(turns: Turns, generation: int) -> None:
    turns.accepting[generation] = turns.free


def knows_all(index: int) -> bool:
    return True


def test_successive_generations_take_turns() -> None:
    turns = Turns()
    enter(turns, 1)
    turns.turn_to(0, {0, 1}, knows_all)
    enter(turns, 2)
    assert turns.accepting == {1: 0, 2: 1}
    assert turns.starting == 2

    turns.turn_to(1, {0, 1}, knows_all)
    assert turns.starting is None
    assert turns.leave(1, 5.0) == 0
    assert turns.free == 0
    assert turns.leaving == {1: (0, 5.0)}


def share_of(turns: Turns) -> tuple[int, int]:
    return turns.share_of(PAIR), turns.share_of(ONE)


def test_a_share_goes_to_the_other_socket_where_both_generations_accept() -> None:
    turns = Turns()
    enter(turns, 1)
    turns.turn_to(0, {0, 1}, knows_all)
    enter(turns, 2)
    assert share_of(turns) == (0, 0)
    assert not turns.gets_clients(PAIR, 1)

    turns.turn_to(0, {0, 1}, knows_all, Share(2, 500, frozenset({0, 1})))
    assert share_of(turns) == (500, 0), "one socket has no other"
    assert turns.gets_clients(PAIR, 0)
    assert turns.gets_clients(PAIR, 1)
    assert turns.current == 0

    turns.turn_to(0, {0, 1}, knows_all, Share(2, 500, frozenset({1})))
    assert share_of(turns) == (0, 0), "one of them does not know the listener"
    turns.turn_to(0, {0, 1}, knows_all, Share(2, 500, frozenset({0})))
    turns.note_replaced(PAIR, 1)
    assert share_of(turns) == (0, 0), "the socket was replaced"


def test_a_share_ends_with_the_next_order_or_with_its_generation() -> None:
    turns = Turns()
    enter(turns, 1)
    turns.turn_to(0, {0}, knows_all)
    enter(turns, 2)
    share = Share(2, 500, frozenset({0}))
    turns.turn_to(0, {0}, knows_all, share)
    turns.leave(2, 5.0)
    assert turns.share_of(PAIR) == 0
    turns.turn_to(0, {0}, knows_all, share)
    turns.turn_to(0, {0}, knows_all)
    assert turns.share is None


def test_clients_of_a_listener_that_a_generation_does_not_know_stay_where_they_come() -> None:
    turns = Turns()
    enter(turns, 1)
    turns.turn_to(0, {0, 1}, knows_all)
    enter(turns, 2)
    turns.turn_to(1, {0, 1}, lambda index: index == 1)

    assert (turns.number_for(PAIR), turns.number_for(ONE)) == (0, 1)
    turns.turn_to(1, {1}, knows_all)  # it was removed
    assert turns.expected == {}


def test_clients_of_a_new_listener_wait_for_the_generation_that_is_to_know_it() -> None:
    turns = Turns()
    enter(turns, 1)
    assert turns.expect(PAIR, dry_run=False) == turns.free == 1
    assert turns.unserved == {(1, 0)}
    assert turns.is_served(PAIR, 1)  # a generation is to come
    enter(turns, 2)
    assert turns.note_new_worker(1, knows_all)
    assert not turns.note_new_worker(1, knows_all)
    turns.leave(1, 0.0)
    assert (turns.unserved, turns.partly_served) == (frozenset(), frozenset())


def test_who_lacks_a_socket_that_was_bound_in_the_place_of_another_one() -> None:
    turns = Turns()
    enter(turns, 1)
    turns.turn_to(0, {0, 1}, knows_all)
    enter(turns, 2)

    assert turns.note_replaced(PAIR, 0) == {1}
    assert not turns.is_served(PAIR, 0)
    assert turns.is_served(PAIR, 1)
    assert turns.note_replaced(ONE, None) == {1, 2}
    assert not turns.is_served(ONE, 0)


def test_workers_may_still_accept_shortly_after_their_order_to_finish() -> None:
    turns = Turns()
    enter(turns, 1)
    turns.turn_to(0, {0, 1}, knows_all)
    assert turns.workers_may_accept(PAIR, 0, 0.0)
    assert not turns.workers_may_accept(PAIR, 1, 0.0)  # it is the next one's
    assert turns.workers_may_accept(ONE, 1, 0.0)  # it is common to all

    turns.leave(1, 5.0)

    assert turns.workers_may_accept(PAIR, 0, 4.9)
    assert not turns.workers_may_accept(PAIR, 0, 5.0)
    assert not turns.workers_may_accept(PAIR, 1, 4.9)
    assert turns.workers_may_accept(ONE, 1, 4.9)


def test_workers_of_the_second_socket_may_still_accept_from_it_after_their_order() -> None:
    turns = Turns(current=1)
    enter(turns, 1)
    turns.leave(1, 5.0)

    assert turns.workers_may_accept(PAIR, 1, 4.9)
    assert not turns.workers_may_accept(PAIR, 0, 4.9)
    assert turns.workers_may_accept(ONE, 0, 4.9)


def test_workers_accept_from_no_socket_that_was_bound_after_their_start() -> None:
    turns = Turns()
    enter(turns, 1)
    turns.note_replaced(PAIR, 0)
    assert not turns.workers_may_accept(PAIR, 0, 0.0)

    turns.note_new_worker(1, knows_all)  # a later worker has it

    assert turns.workers_may_accept(PAIR, 0, 0.0)


def test_clients_of_a_lost_socket_come_to_the_next_generations_and_are_not_forgotten() -> None:
    turns = Turns()
    enter(turns, 1)
    turns.turn_to(0, {0, 1}, knows_all)
    assert not turns.pass_on(PAIR)
    turns.note_replaced(PAIR, 0)
    assert turns.lacks_workers(PAIR)
    assert turns.pass_on(PAIR)
    assert not turns.lacks_workers(PAIR)
    assert turns.number_for(PAIR) == turns.free == 1
    assert turns.number_for(ONE) == 0
    assert not turns.is_served(PAIR, 1)  # until there is one

    enter(turns, 2)
    assert turns.is_served(PAIR, 1)
    turns.leave(2, 0.0)  # it has failed
    assert not turns.is_served(PAIR, 1)
    enter(turns, 3)
    turns.turn_to(1, {0, 1}, knows_all)
    assert (turns.number_for(PAIR), turns.passed_on) == (1, frozenset())


def test_what_was_passed_in_is_its_owner_s_at_the_end() -> None:
    foreign = cast("Any", SimpleNamespace(**{**PAIR.__dict__, "settings": None}))
    foreign.settings = SimpleNamespace(foreign=True)
    turns = Turns()
    enter(turns, 1)
    turns.turn_to(1, {0}, None)
    assert turns.not_given_back((foreign,), 0) == [foreign]
    turns.given_back = True
    assert turns.not_given_back((foreign,), 0) == []
    assert turns.is_served(foreign, 0)


def test_in_all_orders_of_events_clients_come_to_a_generation_or_to_the_next_one() -> None:
    """enter, serve, roll back, leave the oldest, leave the newest, lose a socket, move clients."""

    def serve(turns: Turns) -> None:
        if turns.starting is not None:
            turns.turn_to(turns.accepting[turns.starting], {0, 1}, knows_all)

    def roll_back(turns: Turns) -> None:
        older = [n for n in turns.accepting if turns.accepting[n] != turns.current]
        if older:
            turns.turn_to(turns.accepting[min(older)], {0, 1}, knows_all)

    def open_next(turns: Turns) -> None:
        if turns.free not in turns.accepting.values():
            enter(turns, 1 + max((*turns.accepting, *turns.leaving), default=0))

    def leave(turns: Turns, newest: bool) -> None:
        others = [n for n in turns.accepting if turns.accepting[n] != turns.current]
        if others:
            turns.leave(max(others) if newest else min(others), 0.0)

    def pass_on(turns: Turns) -> None:
        if turns.free not in turns.accepting.values():
            turns.pass_on(PAIR)

    events = (
        open_next,
        serve,
        roll_back,
        lambda turns: leave(turns, newest=False),
        lambda turns: leave(turns, newest=True),
        lambda turns: turns.note_replaced(PAIR, turns.current),
        pass_on,
    )
    first = Turns()
    open_next(first)
    serve(first)
    reached = {repr(first): first}
    for _ in range(rounds(5, 6)):
        after = {}
        for turns, event in itertools.product(reached.values(), events):
            turns = copied(turns)
            event(turns)
            check(turns)
            after[repr(turns)] = turns
        reached = after
    assert len(reached) > 100


def copied(turns: Turns) -> Turns:
    return Turns(
        turns.current,
        dict(turns.accepting),
        dict(turns.leaving),
        dict(turns.expected),
        turns.unserved,
        turns.partly_served,
        turns.passed_on,
        turns.given_back,
    )


def check(turns: Turns) -> None:
    assert len(turns.accepting) <= 2
    assert len(set(turns.accepting.values())) == len(turns.accepting)
    assert turns.free not in turns.accepting.values() or len(turns.accepting) == 2
    for listener in BOTH:
        number = turns.number_for(listener)
        there = turns.accepting_at(listener, number)
        lacking = {(n, listener.index) for n in there} <= turns.unserved
        in_vain = lacking if there else listener.index in turns.passed_on
        assert turns.is_served(listener, number) != in_vain
    assert {n for n, _ in turns.unserved} <= turns.accepting.keys()
