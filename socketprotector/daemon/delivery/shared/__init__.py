"""Workers accept connections from sockets that they share with the protector.

socket_steering.py knows which generation has which socket, and steers clients to the sockets.
probes.py also counts the waiting connections (`queue` in status).  accept_counts.py counts the
open connections.
"""
