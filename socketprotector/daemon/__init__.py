"""The resident process: its loop takes events, package core decides, and effects.py acts.

At an upgrade or after a crash, SocketProtector is executed again: "the next program" takes over
descriptors and state from "an earlier program".  "The next start" follows a stop, without state.
May import: core, model, system.
"""
