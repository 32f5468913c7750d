"""What viewers of the page get, and when, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import pytest
from socketprotector_exporter import web_hub
from socketprotector_exporter.web import application
from socketprotector_exporter.web_hub import Hub

from tests.running import DEADLINE_S
from tests.unit.ctl.fake import Fake, listener, status

Fakes = Callable[[str], Fake]
Event = dict[str, Any]


@asynccontextmanager
async def watched(hub: Hub) -> AsyncIterator[Callable[[], Awaitable[Event]]]:
    """Run a hub, and have what it tells its one viewer, message by message."""
    running = asyncio.create_task(hub.run())
    with hub.viewer() as news:
        messages = hub.watch(news)

        async def next_event() -> Event:
            message = await anext(messages)
            found: Event = json.loads(message.partition(b"data: ")[2] or b"{}")
            return found

        yield next_event
        await messages.aclose()  # type: ignore[attr-defined]
    running.cancel()
    await asyncio.wait([running])


def test_a_check_of_the_events_ends_at_once_and_is_no_viewer() -> None:
    """As `curl --head` does it; an answer without an end would keep one of the places."""
    messages: list[MutableMapping[str, Any]] = []
    hub = Hub(list)
    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "HEAD", "path": "/events", "headers": headers}

    async def stay() -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError

    async def tell(message: MutableMapping[str, Any]) -> None:
        assert hub.viewers == 0
        messages.append(message)

    asyncio.run(asyncio.wait_for(application(hub)(scope, stay, tell), DEADLINE_S))

    assert messages[0]["status"] == 200
    assert (b"content-type", b"text/event-stream; charset=utf-8") in messages[0]["headers"]


def test_points_of_sparklines_are_sent_at_each_step_though_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web_hub, "STEP_S", 0.02)

    async def watch() -> list[Event]:
        async with watched(Hub(list)) as next_event:
            return [await next_event() for _ in range(4)]

    hello, whole, *steps = asyncio.run(asyncio.wait_for(watch(), DEADLINE_S))

    assert "points" not in hello
    assert "points" not in whole
    assert [each["points"] for each in steps] == [{}, {}]


def test_a_name_is_short_again_once_no_other_instance_has_it(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_hub, "KEPT_S", 0.0)
    monkeypatch.setattr(web_hub, "_LOOK_FOR_S", 0.05)
    first, second = fakes("first"), fakes("second")
    for port, each in enumerate((first, second), 8001):
        each.status = status(listeners=[listener(f"tcp:0.0.0.0:{port}")], name="web")
    paths = [str(first.path), str(second.path)]

    async def watch() -> None:
        names: dict[str, str] = {}
        async with watched(Hub(lambda: list(paths))) as next_event:

            async def until(wanted: set[str]) -> None:
                while set(names.values()) != wanted:
                    found = await next_event()
                    names.update({each["id"]: each["name"] for each in found.get("instances", [])})
                    ids = found.get("ids", list(names))
                    for gone in names.keys() - set(ids):
                        del names[gone]

            await until({"web:8001", "web:8002"})
            del paths[1]
            await until({"web"})

    asyncio.run(asyncio.wait_for(watch(), DEADLINE_S))
