"""twisted.web that finishes what it has before it leaves.  Needs LISTEN_FDS.

`twistd web` cuts every connection on TERM, requests under way or not: so this waits for them first.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import os
from typing import Any

from ready import ready
from release import STATUS
from twisted.internet import defer, reactor, task
from twisted.internet.endpoints import serverFromString
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

WAIT_S = float(os.environ.get("WAIT_S", "0"))
GRACE_S = 1.0  # for requests that are on their way in connections that were accepted already
loop: Any = reactor


class Answer(Resource):
    isLeaf = True
    under_way = 0

    def render_GET(self, request: Request) -> int:
        Answer.under_way += 1
        request.notifyFinish().addBoth(self.done)
        request.setHeader("Content-Type", "text/plain")
        request.setResponseCode(STATUS)
        loop.callLater(WAIT_S, self.answer, request)
        return NOT_DONE_YET

    def answer(self, request: Request) -> None:
        request.write(f"{os.getpid()}\n".encode())
        request.finish()

    def done(self, _: object) -> None:
        Answer.under_way -= 1


async def finish(port: Any) -> None:
    await defer.maybeDeferred(port.stopListening)
    await task.deferLater(loop, GRACE_S)
    while Answer.under_way:
        await task.deferLater(loop, 0.01)


def listening(port: Any) -> None:
    ready()
    loop.addSystemEventTrigger(
        "before", "shutdown", lambda: defer.Deferred.fromCoroutine(finish(port))
    )


serverFromString(loop, "systemd:domain=INET:index=0").listen(Site(Answer())).addCallback(listening)
loop.run()
