"""The protector accepts connections, and sends them to the queue of the generation with the route.

acceptor.py accepts and sends connections.  outlet.py handles a failed send.  forwarder.py decides
when to accept, and takes connections back.
"""
