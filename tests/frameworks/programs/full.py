"""A server that does not accept while it has one client."""

from __future__ import annotations

import sys

from tests.frameworks.programs.pages import wsgi

if sys.argv[1] == "gevent":
    from gevent.pywsgi import WSGIServer
    from socketprotector_client.gevent import Listener, WSGIHandler

    options = {"handler_class": WSGIHandler, "log": None, "spawn": 1}
    WSGIServer(Listener(), wsgi, **options).serve_forever()
else:
    from socketprotector_client.waitress import serve

    # It counts its listener and its trigger, too.
    serve(wsgi, connection_limit=3)
