"""The control socket: clients, commands and answers (docs/control.md).

server.py reads requests and sends answers, commands.py carries commands out.  The values of
`status` are in commands.py (the protector), status.py (generations, workers, listeners) and
rollout.py (a rollout).
"""
