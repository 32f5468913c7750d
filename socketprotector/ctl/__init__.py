"""socketprotectorctl: sends requests to control sockets (docs/control.md), and shows the answers.

The protector never imports it.  The modules that send requests need only the standard library.
May import: model, system.
"""
