"""One thin module for each thing of the kernel, of systemd or of files that SocketProtector uses.

Signals by number: signals.py.  Variables from systemd, and messages to it: sd_notify.py.  Each
module wraps calls and documents their errors; none decides anything about the service.
May import: model.
"""
