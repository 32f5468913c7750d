"""Plain values that every other folder speaks in: settings, records, modes, texts, formats.

No system call, no clock: what a function here returns follows from its arguments.
May import: nothing.
"""
