"""What one false instance can cost the page: the others are shown all the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from socketprotector_exporter import web_hub
from socketprotector_exporter.share import Share
from socketprotector_exporter.web_hub import Hub
from socketprotector_exporter.web_model import Instance
from socketprotector_exporter.web_text import shortened

from tests.hostile import instance as false
from tests.running import DEADLINE_S
from tests.unit.ctl import fake as good
from tests.unit.ctl.fake import Fake

Fact = Callable[[dict[str, Any]], bool]
STATUS = b'{"v":1,"id":"status","ok":true,"result":{}}\n'


def test_after_much_time_of_one_the_others_get_theirs() -> None:
    times = iter([0.0, 0.01, 1.0, 1.04, 5.0, 5.0])
    share = Share(lambda: next(times))

    assert share.owed_s() == 0.0
    share.began()
    assert share.owed_s() == 0.0, "little"
    share.began()
    assert share.owed_s() == pytest.approx(1.0), "together 0.05 s, of which it may have a twentieth"
    share.began()
    assert share.owed_s() == 0.0
    assert share.owed_s() == 0.0


def followed(paths: list[str], fact: Fact) -> list[dict[str, Any]]:
    """Follow instances until this is so of one; return the events that were told by then."""
    events: list[dict[str, Any]] = []

    async def follow() -> None:
        hub = Hub(lambda: paths)
        running = asyncio.create_task(hub.run())
        try:
            with hub.viewer() as news:
                async with asyncio.timeout(DEADLINE_S):
                    async for message in hub.watch(news):
                        data = json.loads(message.partition(b"data: ")[2] or b"{}")
                        events.extend(data.get("events", ()))
                        if any(map(fact, data.get("instances", ()))):
                            return
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    asyncio.run(follow())
    return events


def test_no_more_is_read_of_one_that_has_had_its_share(
    runtime: Path, fakes: Callable[[str], Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ten(Share):
        heard = 0

        def began(self) -> None:
            self.heard += 1

        def owed_s(self) -> float:
            return 1000.0 if self.heard >= 10 else 0.0

    def floods(send: false.Send) -> None:
        send(STATUS)
        false.events(send)

    monkeypatch.setattr(web_hub, "Share", Ten)
    web = fakes("web")
    with false.instance(runtime / "flood.control", floods) as path:
        events = followed([path, str(web.path)], lambda each: each.get("phase") == "serving")

    assert len(events) in range(10)


def test_an_answer_that_was_not_asked_for_is_no_protectors(runtime: Path) -> None:
    def answers(send: false.Send) -> None:
        while send(STATUS * 1000):
            pass

    with false.instance(runtime / "x.control", answers) as path:
        followed([path], lambda each: each["why"] == "no protector")


@pytest.mark.parametrize("name", ["generations", "listeners", "waits_for"])
def test_of_a_list_without_end_the_end_is_shown(name: str) -> None:
    each = {"number": 1, "address": "tcp:1", "reason": "x"}
    status = good.status(**{name: [each] * 60_000})
    instance = Instance("/x.control")

    instance.see(shortened(status), 1.0, 1.0)

    assert len(json.dumps(instance.shown())) < 100_000
    assert shortened(good.status()) == good.status()


def test_no_name_turns_the_text_around_it(fakes: Callable[[str], Fake]) -> None:
    web = fakes("web")
    web.status["name"] = f"web{false.ESCAPES[:-1]}"
    shown: list[str] = []

    def is_named(each: dict[str, Any]) -> bool:
        shown.append(each["name"])
        return bool(each["name"].startswith("web\\"))

    followed([str(web.path)], is_named)

    assert all(each.isprintable() for each in shown)


def test_a_long_line_is_read_in_pieces_and_one_without_end_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web_hub, "LONGEST_LINE", 1000)

    async def story() -> None:
        reader = asyncio.StreamReader(limit=10)
        lines = web_hub._Lines(reader)
        reader.feed_data(b"x" * 50)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lines.next(), 0.01)
        reader.feed_data(b"x" * 50 + b"\nshort\n" + b"y" * 25 + b"\n")
        assert [await lines.next() for _ in range(3)] == [
            b"x" * 100 + b"\n",
            b"short\n",
            b"y" * 25 + b"\n",
        ]
        reader.feed_data(b"z" * 1001)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lines.next(), 0.01)
        reader.feed_data(b"z" * 20)
        with pytest.raises(asyncio.LimitOverrunError):
            await lines.next()

    asyncio.run(story())
