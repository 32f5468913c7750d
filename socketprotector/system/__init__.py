"""One thin module for each thing of the kernel, of systemd or of files that we use.

Signals by number: signals.py.  What systemd tells in variables, and hears: sd_notify.py.  Each
wraps calls and says what they raise; none decides what becomes of the service.
May import: model.
"""
