"""What follows from an event: `decide(fleet, event) -> (fleet, actions)`, and its values.

decide.py: which function answers which event.  step.py: drains, their limits, timers.  workers.py:
how many start at once, respawns, `scale`.  Pure; carried out in daemon/.
May import: model.
"""
