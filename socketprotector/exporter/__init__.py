"""socketprotector-exporter: what control sockets say, as Prometheus metrics over HTTP.

The protector has no HTTP server inside, and the end of this program disturbs no service.
May import: ctl, model.
"""
