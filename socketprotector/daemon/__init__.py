"""The resident process: one loop: events come in, core decides, the actions are carried out.

What a signal or an event causes: supervisor.py.  A connection: acceptor.py (accept, sendmsg),
forwarder.py where that fails.  One thread for the life of the service: memory and time count.
May import: core, model, system.
"""
