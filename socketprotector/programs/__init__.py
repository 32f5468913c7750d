"""Processes of their own beside the resident one: guard, log relay, file watch, stdio, legacy.

The guard keeps descriptors and starts a killed protector again, which adopts the workers.
They are executed, never called; some by their path and without this package (python -I -S).
May import: model, system.
"""
