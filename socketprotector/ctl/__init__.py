"""socketprotectorctl: asks over control sockets (docs/control.md), and shows the answer.

The protector never imports it.  The modules that ask need only the standard library.
May import: model, system.
"""
