"""The resident process: a single loop takes events, lets core decide, and carries the actions out.

supervisor.py handles signals and events; delivery/ brings connections to the workers.
The process has one thread and runs as long as the service, so memory and time count.
"The earlier program" and "the next program" are this process before and after an upgrade or a
crash; it keeps descriptors and state.  "The route" leads to the generation that gets clients.
May import: core, model, system.
"""
