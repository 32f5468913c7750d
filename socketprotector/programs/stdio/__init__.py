"""A worker that starts a program for each connection: --handoff stdio.

The connection is the program's stdin and stdout.  Executed as `python -m
socketprotector.programs.stdio`; docs/stdio.md describes it for users.  It runs as long as the
service, so it imports little.
"""
