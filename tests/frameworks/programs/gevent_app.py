"""gevent's WSGI server, without patching."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import gevent
from gevent.pywsgi import WSGIServer
from socketprotector_client.gevent import Listener, WSGIHandler

from tests.frameworks.programs.pages import wsgi


def threaded(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    # The gate is no socket, so it would hold up all greenlets.
    result: Iterable[bytes] = gevent.get_hub().threadpool.apply(wsgi, (environ, start_response))
    return result


listener = Listener(sys.argv[1])
WSGIServer(listener, threaded, handler_class=WSGIHandler, log=None).serve_forever()
