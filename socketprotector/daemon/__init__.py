"""The resident process: one loop: events come in, core decides, the actions are carried out.

What a signal or an event causes: supervisor.py.  How connections reach workers: delivery/.
One thread for the life of the service: memory and time count.
May import: core, model, system.
"""
