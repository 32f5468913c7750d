"""The reader's `shop:app`, for a WSGI server."""


def app(environ, start_response):  # type: ignore[no-untyped-def]
    start_response("200 OK", [("Content-Length", "6")])
    return [b"hello\n"]
