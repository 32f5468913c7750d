"""waitress on a Listener, with what it lacks for a drain: an end for idle clients.

waitress knows no graceful stop.  Idle keep-alive connections end there after
`channel_timeout` (120 s), and as long a draining worker would live for them.  Here that time
becomes short when the drain begins, and waitress closes them in its own way.

Source: docs.pylonsproject.org/projects/waitress, "Arguments to waitress.serve".
"""

from __future__ import annotations

from typing import Any, Optional

from waitress import create_server

from .address import ListenAddress
from .listener import Listener
from .process import on_drain

# A client that has just connected, or just read an answer, gets its next request through in
# this time, hence not 0.  waitress looks once a second.
_IDLE_S = 1


def serve(
    app: Any,
    address: Optional[ListenAddress] = None,
    *,
    limit: Optional[int] = None,
    **options: Any,
) -> None:
    """Serve a WSGI application; return when drained.

    `address` and `limit` are those of Listener.  options: waitress's own, but those that say
    where to listen.  A request under way is finished before the end.
    """
    # waitress accepts once for each wake-up, so there is nothing to bound.
    serve_on(Listener(address, limit=limit, take=None), app, **options)


def serve_on(listener: Listener, app: Any, **options: Any) -> None:
    """Serve on a Listener that is there already; takes ownership of it."""
    server = create_server(app, sockets=[listener], **options)

    def end_idle() -> None:
        server.adj.channel_timeout = server.adj.cleanup_interval = _IDLE_S
        server.next_channel_cleanup = 0
        server.pull_trigger()

    on_drain(end_idle)
    server.run()
