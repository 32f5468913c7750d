"""The protector accepts, and hands each connection to the queue of the generation with the route.

A connection: acceptor.py; where that fails: outlet.py; when, and what comes back: forwarder.py.
"""
