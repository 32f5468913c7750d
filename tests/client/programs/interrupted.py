"""Ctrl-C while every thread but the calling one is busy with a client that never ends."""

from __future__ import annotations

from socketprotector_client import serve

from tests.client.programs.talk import say, talk

try:
    serve(talk, threads=2)
except KeyboardInterrupt:
    say("interrupted")
