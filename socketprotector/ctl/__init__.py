"""socketprotectorctl: sends requests to control sockets (docs/control.md), and shows the answers.

Columns of `status` and `top`: status_table.py.  Folders of control sockets: system/control_path.py.
The protector never imports this package; modules that send requests need only the standard library.
May import: model, system.
"""
