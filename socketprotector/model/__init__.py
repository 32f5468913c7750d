"""Plain values that every other folder speaks in: settings, records, modes, texts, formats.

What a handoff mode can do and which options it refuses: handoff_modes.py.  What outlives the
program: records.py, history.py.  No system call, no clock.
May import: nothing.
"""
