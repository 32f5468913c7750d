"""The resident process: a single loop takes events, lets core decide, and carries the actions out.

It has one thread and runs as long as the service, so memory and time count.  "The next program" is
this process after an upgrade or a crash, with the same descriptors and state.
May import: core, model, system.
"""
