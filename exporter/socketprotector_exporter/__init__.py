"""socketprotector-exporter: what control sockets say, as metrics for Prometheus and as a page.

The protector has no HTTP server inside; the exporter is a separate process and a distribution of
its own: if it dies, no service is affected.  Of socketprotector it imports `ctl.api` alone.
"""
