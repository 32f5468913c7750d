"""A worker that starts a program for each connection, which is the program's stdin and stdout.

Executed as `python -m socketprotector.programs.stdio`; docs/stdio.md is what users see.  It stays
as long as the service, so it imports little.
"""
