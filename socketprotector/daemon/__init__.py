"""The resident process: its loop takes events, package core decides, and effects.py acts.

The process lives as long as the service, and has one thread.  "The next program" is the
SocketProtector that runs after an upgrade or a crash, with the same descriptors and state.
May import: core, model, system.
"""
