"""From a command line to a running daemon: read, check, bind, detach, execute the resident one.

options.py has every option: its type, its help, whether a reload may change it.  Ends when the
resident process stands; nothing of it is loaded there.
May import: model, programs, system.
"""
