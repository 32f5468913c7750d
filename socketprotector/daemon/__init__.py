"""The resident process: one loop: events come in, core decides, the actions are carried out.

What a signal or an event causes: supervisor.py.  Memory and time count here: it lives as long as
the service, and one thread serves everything.
May import: core, model, programs, system.
"""
