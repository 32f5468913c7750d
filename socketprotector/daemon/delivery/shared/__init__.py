"""Workers accept, from sockets that they share with the protector.

Which generation has which socket, and how clients get to it: socket_steering.py.
"""
