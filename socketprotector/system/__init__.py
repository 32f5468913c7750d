"""Thin modules, one for each interface of kernel, systemd or file system that we use.

Signals by number: signals.py.  Variables from systemd, and messages to it: sd_notify.py.  Each
module wraps calls and documents their errors; none decides anything about the service.
May import: model.
"""
