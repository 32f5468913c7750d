"""serve(), with a pool of threads."""

from __future__ import annotations

from socketprotector_client import serve

from tests.client.programs.talk import options, say, talk

chosen = options()
serve(talk, chosen.address, threads=chosen.threads, limit=chosen.limit)
say("ended")
