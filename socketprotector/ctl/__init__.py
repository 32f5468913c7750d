"""socketprotectorctl: sends requests to control sockets (docs/control.md) and shows the answers.

discovery.py finds a protector's control socket.  status_table.py has the columns of `status` and
`top`.  The protector never imports this package.  api.py can be imported without third-party
packages.
May import: model, system.
"""
