"""The command line of a well-known server, made anew from what the operator has typed.

Pure, for the launching process.  It is meant for the terminal that was typed at and for nothing
that is kept: an argument may be a secret (docs/security.md).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence

from ..model import handoff, known_servers
from . import options
from .listen_spec import Listen

#: What a shell takes as it stands.  It leaves {fd:NAME} alone.
_PLAIN = re.compile(r"(?:[\w@%+=:,./-]|\{fd:\w+\})+", re.ASCII)
_NAMED = re.compile(r"\{fd:(\w+)\}")
#: What --handoff listener refuses: whoever wants one of these has to choose by himself.
_REFUSED = {f"--{option}" for mode, option in handoff.REFUSED if mode == handoff.LISTENER}


def line(words: Sequence[str], listens: Sequence[Listen], mode: str) -> str | None:
    """Return the line with all that the server wants; None where that is not certain.

    words: what was typed.  listens: its addresses.  mode: how connections come to the server now.
    """
    ours, command = options.split(words)
    name = known_servers.known(command)
    server = known_servers.KNOWN[name] if name else None
    texts = {each.text for each in listens}
    places = [place for place, word in enumerate(ours) if word in texts]
    if server is None or server.drops is None or len(places) != len(listens):
        return None
    if _REFUSED.intersection(word.partition("=")[0] for word in ours):
        return None
    adds = server.adds
    named = _NAMED.search(adds)
    if named is not None:
        if len(listens) != 1 or listens[0].passed is not None:
            return None
        if listens[0].called:
            adds = adds.replace(named[0], f"{{fd:{listens[0].called}}}")
        else:
            ours[places[0]] = f"{named[1]}={ours[places[0]]}"
    wanted = server.options.split()
    ours, said = _without(ours, {"--handoff", "--ready", "--settle"}, {"--check"})
    if "--settle" in said:
        wanted = [*_without(wanted, {"--settle"})[0], "--settle", said["--settle"]]
    if mode == handoff.LISTENER and "--ready" in said and "--ready" not in wanted:
        wanted += ["--ready", said["--ready"]]
    at = known_servers.place(command) + 1
    rest, dropped = _without(command[at:], server.drops, server.flags)
    workers = dropped.get("--workers") or dropped.get("-w") or ""
    if workers.isdecimal() and "--workers" not in " ".join(ours):
        wanted += ["--workers", workers]
    whole = ["SocketProtector", "--handoff", handoff.LISTENER, *wanted, *ours, "--"]
    return " ".join(map(_quoted, [*whole, *command[:at], *adds.split(), *rest]))


def _without(
    words: Sequence[str], valued: Collection[str], flags: Collection[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Take options out: `--name VALUE`, `--name=VALUE`, `-n VALUE`, `-nVALUE`.

    Returns what is left, and the values.
    """
    left: list[str] = []
    values: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        head, equals, value = word.partition("=")
        if not word.startswith("--"):
            head, equals, value = word[:2], word[2:], word[2:]
        if head in valued:
            values[head] = value if equals else next(rest, "")
        elif word not in flags:
            left.append(word)
    return left, values


def _quoted(word: str) -> str:
    return word if _PLAIN.fullmatch(word) else shlex.quote(word)
