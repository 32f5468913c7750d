"""socketprotector-exporter: what control sockets say, as Prometheus metrics over HTTP.

A program of its own: the protector has no HTTP server inside, and its end is nobody's trouble.
`series` and `totals` make metrics of statuses, `server` answers, `entry` is the command line.
"""
