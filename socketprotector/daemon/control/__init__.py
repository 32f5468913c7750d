"""The control socket: clients, commands and answers (docs/control.md).

server.py reads requests and sends answers; commands.py carries out commands.  status.py
(generations, workers, listeners), rollout.py (a rollout) and releases.py (releases) collect values
for `status`.
"""
