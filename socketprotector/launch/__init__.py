"""Starts a daemon from a command line: read, check, bind, detach, execute the resident process.

options.py has every option.  The operator starts the launching process, which waits for the
verdict of the first start, and exits with it.  With -f the launching process becomes the resident
process.  The resident process loads none of these modules.
May import: model, programs, system.
"""
