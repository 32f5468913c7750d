"""The resident process: a single loop takes events, lets core decide, and carries the actions out.

What a signal or an event causes: supervisor.py.  How connections reach workers: delivery/.
The process has one thread and runs as long as the service, so memory and time count.
May import: core, model, system.
"""
