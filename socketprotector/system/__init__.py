"""One thin module for each thing of the kernel, of systemd or of files that we use.

Signals by number: signals.py (what one causes: daemon/supervisor.py).  Each wraps calls and says
what they raise; none decides what becomes of the service.
May import: model.
"""
