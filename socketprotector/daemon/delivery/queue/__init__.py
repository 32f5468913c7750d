"""The protector accepts, and hands each connection to the queue of the generation with the route.

Accepting and sending a connection: acceptor.py; a failed send: outlet.py; when to accept, and
connections that are taken back: forwarder.py.
"""
