"""socketprotectorctl: asks over control sockets (docs/control.md), and shows the answer.

A program of its own: the protector never imports it.  `client`, `session`, `survey` and `find`
need nothing but the standard library; the exporter uses them too.
"""
