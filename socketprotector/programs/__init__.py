"""Programs that run as processes beside the resident one: guard, relay, prober, watcher, adapters.

The guard keeps descriptors and starts a killed protector again, which adopts the workers.
All programs are executed, never called; some by path and without this package (python -I -S).
May import: model, system.
"""
