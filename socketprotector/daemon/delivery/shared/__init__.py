"""Workers accept connections from sockets that they share with the protector.

turns.py assigns a socket to each generation.  socket_steering.py steers new clients to the socket
of the serving generation.  probes.py brings probes to any generation, and counts the connections
that wait (`queue` in `status`).  open_counts.py counts the open connections.
"""
