"""Starts a daemon from a command line: read, check, bind, detach, execute the resident process.

The launching process waits for the verdict of the first start, and exits with its status.  With -f
the launching process becomes the resident process, which loads none of these modules.  options.py
has every option.
May import: model, programs, system.
"""
