"""Plain values that all other folders share: settings, records, modes, texts, formats.

Capabilities of a handoff mode, and options it refuses: handoff_modes.py.  A worker's variables for
its listeners: listen_fds.py.  The records that outlive the program: records.py.  No system call.
May import: nothing.
"""
