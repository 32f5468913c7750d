"""The delivery in which the protector accepts connections, and sends them to workers.

Each generation's queue is a channel.  The route is the generation that gets new clients; in this
folder, a variable `route` holds this generation's channel.  acceptor.py accepts connections and
sends them to the route.  outlet.py handles a failed send.  forwarder.py decides when to accept, and
takes connections back from queues.
"""
