"""Starts a daemon from a command line: read, check, bind, detach, execute the resident process.

options.py has every option.  The launching process ends with the verdict of the first start; with
-f it becomes the resident process, which loads none of these modules.
May import: model, programs, system.
"""
