"""socketprotector-exporter: the status of instances as metrics for Prometheus and as a page.

The protector has no HTTP server.  The exporter is a separate process and distribution, so its death
affects no service.  It imports only `ctl.api` of socketprotector.
"""
