"""The delivery in which the protector accepts connections, and sends them to workers.

Each generation's queue is a channel.  The route is the generation that gets new clients; variables
named `route` hold its channel.  acceptor.py sends new connections to the route.  outlet.py handles
a failed send.  forwarder.py decides when to accept, and takes connections back from queues.
"""
