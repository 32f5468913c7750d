"""socketprotectorctl: sends requests to control sockets (docs/control.md) and shows the answers.

discovery.py finds a protector's socket, and status_table.py has the columns of `status` and `top`.
The protector never imports this package.  The imports of api.py need no third-party package.
May import: model, system.
"""
