"""socketprotectorctl: sends requests to control sockets (docs/control.md) and shows the answers.

status_table.py has the columns of `status` and `top`; system/control_path.py finds the sockets.
The protector never imports this package.  api.py needs no third-party package.
May import: model, system.
"""
