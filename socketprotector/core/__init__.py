"""What follows from an event: `decide(fleet, event) -> (fleet, actions)`, and its values.

Pure: supervision is decided here and carried out in daemon/.
May import: model.
"""
