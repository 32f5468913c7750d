"""From a command line to a running daemon: read, check, bind, detach, execute the resident one.

Ends when the resident process stands; nothing of it is loaded there.
May import: model, programs, system.
"""
