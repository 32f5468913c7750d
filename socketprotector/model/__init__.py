"""Plain values that every other folder speaks in: settings, records, modes, texts, formats.

What a handoff mode can do and which options it refuses: handoff_modes.py.  Variables a worker gets
to find its listeners: listen_fds.py.  What outlives the program: records.py.  No system call.
May import: nothing.
"""
