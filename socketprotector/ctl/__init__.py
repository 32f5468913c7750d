"""socketprotectorctl: sends requests to control sockets (docs/control.md) and shows the answers.

discovery.py finds a protector's control socket; status_table.py has `status` and `top`'s columns.
The protector never imports this package.  api.py needs no third-party packages.
May import: model, system.
"""
