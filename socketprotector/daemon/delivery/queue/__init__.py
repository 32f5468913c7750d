"""The delivery in which the protector accepts connections, and sends them to workers.

Each generation's queue is a channel.  In this folder, the route is the channel of the generation
that gets new clients.  acceptor.py accepts connections and sends them to the route.  outlet.py
handles a failed send.  forwarder.py decides when to accept, and takes connections back from queues.
"""
