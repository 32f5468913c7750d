"""The resident process: its loop takes events, package core decides, and effects.py acts.

At an upgrade or after a crash, "the next program" takes over descriptors and state from "an earlier
program"; both programs are SocketProtector.  "The next start" follows a stop, and finds no state.
May import: core, model, system.
"""
