"""Workers that share one queue, and how much each of them takes."""

from __future__ import annotations

from functools import partial

import pytest

from tests.channel import Channel
from tests.running import Client, eventually

BOTH = pytest.mark.parametrize("way", [("aserve",), ("listener", "1")], ids=["aserve", "listener"])


@BOTH
def test_of_a_queue_of_60_no_asyncio_worker_takes_all_before_its_first_handler(
    channel: Channel, way: tuple[str, ...]
) -> None:
    clients = [channel.connect() for _ in range(60)]

    workers = [channel.spawn("slow_first.py", *way) for _ in range(2)]
    answers = [client.ask("pid") for client in clients]

    assert set(answers) <= {str(worker.pid) for worker in workers}
    for worker in workers:
        if str(worker.pid) in answers and way[0] == "listener":
            # asyncio needs a few turns of its loop before it calls the handler.
            assert int(worker.read_line().rpartition(" ")[2]) <= 6


def test_a_pool_takes_no_more_than_it_has_threads_for(channel: Channel) -> None:
    channel.start("serves.py", "--threads", "2")
    clients = [channel.connect() for _ in range(5)]
    assert [client.ask("hello") for client in clients[:2]] == ["echo hello"] * 2

    assert channel.queued() == 3
    clients[0].close()

    assert clients[2].ask("hello") == "echo hello"
    assert channel.queued() == 2


def test_one_thread_serves_one_after_the_other(channel: Channel) -> None:
    channel.start("serves.py", "--threads", "1")
    first, second = channel.connect(), channel.connect()
    assert first.ask("hello") == "echo hello"

    assert channel.queued() == 1
    first.close()

    assert second.ask("hello") == "echo hello"


@pytest.mark.parametrize("program", ["iterates.py", "serves.py", "streams.py"])
def test_what_a_killed_worker_had_not_taken_goes_to_the_next(
    channel: Channel, program: str
) -> None:
    worker = channel.start(program, "--limit", "1")
    clients = [channel.connect() for _ in range(10)]
    assert clients[0].ask("hello") == "echo hello"

    worker.process.kill()
    worker.wait()
    channel.start(program)

    assert clients[0].hear() == ""
    for client in clients[1:]:
        assert client.ask("hello") == "echo hello"
        client.close()


def test_a_worker_with_its_own_loop_needs_nothing_but_the_channel(channel: Channel) -> None:
    clients = [channel.connect() for _ in range(20)]
    worker = channel.start("own_loop.py")
    assert worker.ready_lines == ["READY=1"]

    channel.end_channel()

    assert [client.ask("hello") for client in clients] == ["hello"] * 20
    for client in clients:
        client.close()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)


def test_workers_take_from_one_queue_until_it_is_empty(channel: Channel) -> None:
    workers = [channel.start("serves.py", "--threads", "8") for _ in range(2)]

    def comes(client: Client) -> bool:
        if not client.has_answer():
            channel.send_again()
            return False
        return True

    answered = 0
    for _ in range(20):
        clients = [channel.connect() for _ in range(10)]
        for client in clients:
            client.say("pid")
        for client in clients:
            eventually(partial(comes, client), "an answer")
        pids = [client.hear() for client in clients]
        answered += len(pids)
        assert set(pids) <= {str(worker.pid) for worker in workers}
        for client in clients:
            client.close()

    eventually(lambda: channel.queued() == 0, "the queue is empty")
    assert answered == 200
