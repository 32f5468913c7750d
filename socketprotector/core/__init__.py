"""Decides each step of the lifecycle: `decide(fleet, event) -> (fleet, actions)`.

decide.py: which function handles which event.  step.py: drains, their limits, timers.  workers.py:
how many workers start at once, respawns, `scale`.  Pure: daemon/ carries the actions out.
May import: model.
"""
