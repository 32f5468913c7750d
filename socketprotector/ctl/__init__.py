"""socketprotectorctl: sends requests to control sockets (docs/control.md) and shows the answers.

discovery.py finds a control socket.  status_table.py has the columns of `status` and `top`.
The protector never imports this package.  api.py needs no third-party packages.
May import: model, system.
"""
