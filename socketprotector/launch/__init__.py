"""Starts a daemon from a command line: read, check, bind, detach, execute the resident process.

options.py has every option: its type, its help, and whether a reload may change it.  The launch
ends when the resident process runs, which loads none of these modules.
May import: model, programs, system.
"""
