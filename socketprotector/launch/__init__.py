"""Starts a daemon from a command line: read, check, bind, detach, execute the resident process.

The launching process exits with the verdict of the first start.  With -f it becomes the resident
process, which loads none of these modules.  options.py has every option.
May import: model, programs, system.
"""
