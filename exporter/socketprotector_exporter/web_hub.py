"""Keeps one control connection to each instance, and sends changes to viewers.

Whatever the number of viewers, an instance is queried once and a change is encoded once.  A viewer
gets the newest state when it is ready for more.  So a slow viewer delays nothing, and no messages
pile up for it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from socketprotector import __version__
from socketprotector.ctl.api import (
    LONGEST_LINE,
    VERSION,
    Message,
    NoProtector,
    RequestRefused,
    SocketAnswer,
    connect,
    message_in,
)

from .collector import labels
from .share import Share
from .web_model import Instance
from .web_series import STEP_S
from .web_text import line, shortened

#: How often an instance is queried for its status: with a viewer and changes, with a viewer and no
#: changes, and without a viewer (a step of the sparklines).
BUSY_S, QUIET_S, UNSEEN_S = 1.0, 2.5, float(STEP_S)
#: The shortest time between two queries after events: a hundred events may come in a row.
_EVENTFUL_S = 0.1
_ANSWER_S = 2.0
_LOOK_FOR_S = 2.0
#: How long an instance without a socket is shown, so that a viewer sees how it ended.
KEPT_S = 60.0
_RECONNECT_S, _RECONNECT_MOST_S = 0.1, 5.0
EVENTS = 200
#: Changes within this time are sent together.
_GATHER_S = 0.1
#: The interval of empty messages, by which both sides notice a dead connection.
_BEAT_S = 15.0
#: The read buffer for an instance; asyncio reads up to twice as many bytes ahead.
_UNREAD_BYTES = 64 * 1024
#: How many instances a new viewer gets in one message.
_PART = 8

_EVENTS_PLEASE = json.dumps({"v": VERSION, "id": "events", "command": "events"}).encode() + b"\n"
_STATUS_PLEASE = json.dumps({"v": VERSION, "id": "status", "command": "status"}).encode() + b"\n"


class _Feed:
    """An instance, and its connection."""

    def __init__(self, path: str) -> None:
        self.instance = Instance(path)
        self.encoded = b""  # the instance's state
        self.changed = 0  # the number of the last change of this state
        self.task: asyncio.Task[None] | None = None
        self.gone_at: float | None = None  # the time when its socket was first missing


class Hub:
    """All instances and viewers.  For one event loop."""

    def __init__(self, find: Callable[[], list[str]]) -> None:
        """Follow the instances whose control sockets `find` returns.

        find: may block; called in a thread.
        """
        self._find = find
        self._feeds: dict[str, _Feed] = {}
        self._change = 0  # the number of the last change
        self._listed = 0  # the number of the last change to the list or the names of instances
        self._ticked = 0
        self._events: deque[tuple[int, bytes]] = deque(maxlen=EVENTS)
        self._viewers: set[asyncio.Event] = set()

    @property
    def viewers(self) -> int:
        return len(self._viewers)

    async def run(self) -> None:
        """Look for instances and follow each, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            while True:
                self._follow(await asyncio.to_thread(self._find), tasks)
                await asyncio.sleep(_LOOK_FOR_S)

    @contextmanager
    def viewer(self) -> Iterator[asyncio.Event]:
        """Count one more viewer.  Yields an event that is set when there are changes."""
        news = asyncio.Event()
        self._viewers.add(news)
        try:
            yield news
        finally:
            self._viewers.discard(news)

    async def watch(self, news: asyncio.Event) -> AsyncIterator[bytes]:
        """Yield server-sent events for a viewer: the whole state, then the changes."""
        seen = self._change
        hello = {"version": __version__, "host": socket.gethostname(), "now": time.time()}
        yield _message(b"hello", _json({**hello, "ids": self._ids()}))
        for part in _parts(list(self._feeds.values()), _PART):
            yield _message(b"state", _state(instances=map(_with_history, part)))
        yield _message(b"state", _state(events=[line for _, line in self._events]))
        while True:
            try:
                async with asyncio.timeout(_BEAT_S):
                    await news.wait()
            except TimeoutError:
                yield b":\n\n"
                continue
            await asyncio.sleep(_GATHER_S)
            news.clear()
            before, seen = seen, self._change
            yield _message(b"state", self._since(before))

    # -- sending changes ---------------------------------------------------------

    def _changed(self) -> int:
        self._change += 1
        for each in self._viewers:
            each.set()
        return self._change

    def _since(self, change: int) -> bytes:
        return _state(
            instances=[feed.encoded for feed in self._feeds.values() if feed.changed > change],
            events=[line for number, line in self._events if number > change],
            ids=self._ids() if self._listed > change else None,
            points=self._points() if self._ticked > change else None,
        )

    def _ids(self) -> list[str]:
        return [feed.instance.id for feed in self._feeds.values()]

    def _points(self) -> dict[str, Any]:
        """Return the newest points of each sparkline, for viewers every STEP_S."""
        return {feed.instance.id: feed.instance.history.points(2) for feed in self._feeds.values()}

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            self._ticked = self._changed()

    def _show(self, feed: _Feed) -> None:
        """Note a change if an instance looks different now."""
        encoded = _json(feed.instance.shown())
        if encoded != feed.encoded:
            feed.encoded, feed.changed = encoded, self._changed()

    # -- following instances -----------------------------------------------------

    def _follow(self, paths: Sequence[str], tasks: asyncio.TaskGroup) -> None:
        """Follow new sockets, and drop instances whose socket has been gone for KEPT_S."""
        listed, now = list(self._feeds), time.monotonic()
        for path in set(listed) - set(paths):
            feed = self._feeds[path]
            if feed.gone_at is None:
                feed.gone_at = now
            elif now - feed.gone_at >= KEPT_S:
                del self._feeds[path]
                if feed.task is not None:
                    feed.task.cancel()
        for path in paths:
            if path not in self._feeds:
                self._feeds[path] = _Feed(path)
            feed = self._feeds[path]
            feed.gone_at = None
            if feed.task is None or feed.task.done():
                feed.task = tasks.create_task(self._keep(feed))
        self._name()
        if listed != list(self._feeds):
            self._listed = self._changed()

    def _name(self) -> None:
        """Update the names of all instances; instances with the same name get distinct labels."""
        feeds = list(self._feeds.values())
        found = [SocketAnswer(each.instance.path, each.instance.status) for each in feeds]
        for feed, name in zip(feeds, map(line, labels(found)), strict=True):
            if name != feed.instance.name:
                feed.instance.name = name
                self._show(feed)

    async def _keep(self, feed: _Feed) -> None:
        """Stay connected to an instance; after an end, connect again while the socket exists."""
        pause_s = _RECONNECT_S
        while True:
            try:
                began = time.monotonic()
                await self._hear(feed)
                why = "gone"
            except (NoProtector, RequestRefused) as error:
                why = error.code
            except (OSError, asyncio.LimitOverrunError):
                why = "gone"
            except Exception:  # a status that no protector would send
                why = "no protector"
            if time.monotonic() - began > _RECONNECT_MOST_S:
                pause_s = _RECONNECT_S
            feed.instance.lost(why, has_socket=os.path.lexists(feed.instance.path))
            self._show(feed)
            if feed.gone_at is not None:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RECONNECT_MOST_S)

    async def _hear(self, feed: _Feed) -> None:
        """Query an instance, and receive its events, until the connection ends."""
        reader, writer = await asyncio.open_unix_connection(
            sock=connect(feed.instance.path, 0), limit=_UNREAD_BYTES
        )
        lines = _Lines(reader)
        try:
            writer.write(_EVENTS_PLEASE + _STATUS_PLEASE)
            queried_at, answered = time.monotonic(), False
            due = queried_at + _ANSWER_S
            share = Share()
            while True:
                if pause_s := share.owed_s():  # an instance that floods us must not delay others
                    await asyncio.sleep(pause_s)
                try:
                    async with asyncio.timeout(None if due == math.inf else due - time.monotonic()):
                        line = await lines.next()
                except TimeoutError:
                    if not answered:  # it may be suspended, and answer when it resumes
                        feed.instance.lost("silent")
                        self._show(feed)
                        due = math.inf
                        continue
                    writer.write(_STATUS_PLEASE)
                    queried_at, answered = time.monotonic(), False
                    due = queried_at + _ANSWER_S
                    continue
                except asyncio.IncompleteReadError:
                    return
                share.began()
                message = message_in(line)
                if message is None:
                    raise NoProtector(feed.instance.path, "no protector")
                if "event" in message:
                    self._heard(feed, message)
                    if answered:
                        due = min(due, max(time.monotonic(), queried_at + _EVENTFUL_S))
                elif not message.get("ok"):
                    raise RequestRefused(str(message.get("code")), str(message.get("error")))
                elif message.get("id") == "status" and not answered:
                    before = feed.changed
                    result = message.get("result")
                    if not isinstance(result, dict):
                        raise NoProtector(feed.instance.path, "no protector")
                    self._saw(feed, result)
                    answered = True
                    due = queried_at + self._interval_s(changes=feed.changed != before)
                elif message.get("id") != "events":
                    raise NoProtector(feed.instance.path, "no protector")  # an unexpected answer
        finally:
            writer.close()

    def _interval_s(self, *, changes: bool) -> float:
        if not self._viewers:
            return UNSEEN_S
        return BUSY_S if changes else QUIET_S

    def _saw(self, feed: _Feed, status: Message) -> None:
        first = feed.instance.status is None
        feed.instance.see(shortened(status), time.monotonic(), time.time())
        if first:
            self._name()
        self._show(feed)

    def _heard(self, feed: _Feed, message: Message) -> None:
        self._events.append((self._changed(), _json(feed.instance.hear(message))))


class _Lines:
    """The lines from an instance, with a small buffer: a long line is read in pieces."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._begun = bytearray()

    async def next(self) -> bytes:
        """Return the next line; after a cancellation the bytes read so far are kept.

        Raises LimitOverrunError for a line longer than LONGEST_LINE, IncompleteReadError at EOF.
        """
        while True:
            try:
                end = await self._reader.readuntil()
            except asyncio.LimitOverrunError as error:
                if len(self._begun) > LONGEST_LINE:
                    raise
                self._begun += await self._reader.readexactly(error.consumed)
            else:
                line = bytes(self._begun + end)
                self._begun.clear()
                return line


def _with_history(feed: _Feed) -> bytes:
    return _json({**feed.instance.shown(), "history": feed.instance.history.points()})


def _state(
    instances: Iterable[bytes] = (),
    events: Iterable[bytes] = (),
    ids: list[str] | None = None,
    points: dict[str, Any] | None = None,
) -> bytes:
    found = b'{"now":%.3f,"instances":[%b],"events":[%b]' % (
        time.time(),
        b",".join(instances),
        b",".join(events),
    )
    if ids is not None:
        found += b',"ids":' + _json(ids)
    if points is not None:
        found += b',"points":' + _json(points)
    return found + b"}"


def _message(event: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event, data)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _parts(whole: list[_Feed], size: int) -> Iterable[list[_Feed]]:
    return (whole[at : at + size] for at in range(0, len(whole), size))
