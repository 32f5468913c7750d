"""The resident process: a single loop takes events, lets core decide, and carries the actions out.

supervisor.py handles signals and events; delivery/ brings connections to the workers.
The process has one thread and runs as long as the service, so memory and time count.
May import: core, model, system.
"""
