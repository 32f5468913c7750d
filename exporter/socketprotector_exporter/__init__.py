"""socketprotector-exporter: the status of instances as metrics for Prometheus and as a page.

The protector has no HTTP server.  The exporter is a separate process and a separate distribution:
if it dies, no service is affected.  It imports only `ctl.api` of socketprotector.
"""
