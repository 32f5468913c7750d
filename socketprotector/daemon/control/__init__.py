"""The control socket: clients, commands and answers (docs/control.md).

server.py reads requests and sends answers; commands.py carries out commands.  The values that
`status` shows come from commands.py (the protector), status.py (generations, workers, listeners),
rollout.py (a rollout) and releases.py (releases).
"""
