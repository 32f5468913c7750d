"""`SocketProtector demo`: 20 seconds of a server under load, with releases, kills and a count.

A program of its own: it runs the others as a user would, in a folder that it removes.
load.py and seen.py are the clients; the tests use them, too.
May import: ctl, model, system.
"""
