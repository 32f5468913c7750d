"""Processes of their own beside the resident one: guard, log relay, file watch, stdio, legacy.

They are executed, never called; some by their path and without this package (python -I -S).
May import: model, system.
"""
