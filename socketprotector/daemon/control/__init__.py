"""The control socket: clients, commands and answers (docs/control.md).

server.py reads requests and sends answers.  commands.py carries out commands, with releases.py for
`deploy`, `rollback` and `releases`.  status.py, rollout.py and releases.py collect values for
`status`.
"""
