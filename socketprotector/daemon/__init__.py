"""The resident process: one loop that takes in events, has core decide, and acts.

Memory and time count here: it lives as long as the service, and everybody is served by one thread.
May import: core, model, programs, system.
"""
