"""Programs that run as processes beside the resident one: guard, relay, prober, watcher, adapters.

The guard keeps descriptors, and restarts a killed protector, which then adopts the workers.
Programs are executed, never imported; some by path and without this package (python -I -S).
May import: model, system.
"""
