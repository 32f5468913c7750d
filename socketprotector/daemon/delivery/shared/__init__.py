"""Workers accept, from sockets that they share with the protector.

Which generation has which socket, and what is done to it: socket_steering.py.
"""
