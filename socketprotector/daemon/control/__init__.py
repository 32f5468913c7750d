"""The control socket: its clients, its commands, its answers (docs/control.md).

What a status says of the protector: commands.py; of generations, workers, listeners: status.py.
"""
