"""socketprotector-exporter: what control sockets say, as Prometheus metrics over HTTP.

The protector has no HTTP server inside, and the end of this program is nobody's trouble.
May import: ctl, model.
"""
