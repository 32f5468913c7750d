"""A worker that starts a program for each connection, with the connection as stdin and stdout.

A program of its own (`python -m socketprotector.stdio`), which speaks docs/protocol.md like any
other worker: of the daemon it uses only what finds an executable file.  It stays for as long as the
service does, so it imports little; what users see of it is in docs/stdio.md.
"""
