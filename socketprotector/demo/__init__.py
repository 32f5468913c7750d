"""`SocketProtector demo`: 20 seconds of a server under load, with releases, kills and a count.

It runs the other programs as a user would, in a temporary folder.
load.py and seen.py are the clients; the tests use them, too.
May import: ctl, model, system.
"""
