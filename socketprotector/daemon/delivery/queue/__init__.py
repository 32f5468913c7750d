"""The protector accepts connections, and sends them to the route.

Each generation's queue is a channel.  In this folder, the route is the channel of the generation
that gets new clients.  acceptor.py accepts connections and sends them.  outlet.py handles a failed
send.  forwarder.py decides when to accept, and takes connections back from queues.
"""
