"""Workers accept connections from sockets that they share with the protector.

socket_steering.py assigns sockets to generations, and steers clients to the sockets.  probes.py
brings probes to generations, and counts the waiting connections (`queue` in status).
open_counts.py counts the open connections.
"""
