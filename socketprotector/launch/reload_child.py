"""The program that reads the configuration again for a running protector.

It is a separate process, so that the resident process does not load the code for files and command
lines.  It inherits the settings in force, and a socket for the answer.  The answer consists of
records, each with a descriptor:

    listener N    an added socket, bound and listening; N: its index
    twin N        the second socket of listener N, if there is one
    reserved N    the third socket of listener N, which does not listen, if there is one
    differences   a memfd with the changes of the new settings, line by line
    settings      a memfd with the new settings: the last record of a reload
    changes       only for `diff`: a memfd with all changes, line by line
    fixed         only for `diff`: a memfd with the changes for which a reload would be refused
    refused       a memfd with the mistakes, line by line
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from ..model.errors import Mistaken, Refusal, UsageError
from ..model.settings import ListenerSettings, Settings, dump, load
from ..model.text import escape
from ..system import control_path, inherited
from ..system.cleanup import on_error
from . import port_owner, preflight, server_hints
from .bind import (
    Bound,
    addresses_of,
    bind_all,
    discard_all,
    pair,
    place,
    refuse_twice,
    reserve,
)
from .bind_unix import why_alone
from .cli import parse
from .listen_spec import Listen, options_in
from .resolve import ParsedOptions
from .settings_diff import RESTART, changes, forbidden

#: identity is None, because this process already runs as the configured user.
_ALONE = partial(why_alone, identity=None)
#: A listener's index has 16 bits on the channel (docs/protocol.md).
_MOST_LISTENERS = 1 << 16
#: Fields of Settings that the start decides, and a reload keeps.
_STAYS = (
    *("nofile_soft", "batch", "pools", "outlives_terminal", "secret", "notify_folder"),
    *("control", "origin"),
)


def main() -> int:
    """Read the configuration and send the answer.  Returns the exit status."""
    port_owner.protector = os.getppid()
    descriptors = inherited.receive()
    fd = descriptors[inherited.SETTINGS]
    running = load(os.pread(fd, os.fstat(fd).st_size, 0))
    dry = inherited.READER_DRY in descriptors
    line = socket.socket(fileno=descriptors[inherited.READER_DRY if dry else inherited.READER])
    try:
        parsed = parse(running.origin.words, running)
        if parsed is not None:
            _answer(line, running, parsed, dry=dry)
    except Refusal as error:
        # Escape an error to one line.  A Mistaken already has an escaped line for each mistake.
        reason = str(error) if isinstance(error, Mistaken) else escape(str(error))
        _send(line, "refused", _memfd(reason.encode("utf-8", "backslashreplace")))
    return 0


def _answer(line: socket.socket, running: Settings, parsed: ParsedOptions, *, dry: bool) -> None:
    notices: list[str] = []
    new = replace(parsed.settings, **{name: getattr(running, name) for name in _STAYS})
    unchangeable = [*forbidden(running, new), *_control(running, parsed)]
    refused = [escape(f"{each}; {RESTART}") for each in unchangeable]
    cannot = [f"cannot change at a reload: {each}" for each in refused]
    try:
        listeners, bound = _listeners(running.listeners, parsed, notices.append, dry=dry)
    except Refusal as error:
        raise Mistaken("\n".join([*cannot, str(error)])) from error
    added = len(running.listeners)
    with on_error(discard_all, bound):
        new = replace(new, listeners=listeners)
        preflight.check_descriptor_names(new)
        if dry:
            _send(line, "fixed", _memfd("\n".join(refused).encode()))
            _send(line, "changes", _memfd("\n".join([*refused, *_changes(running, new)]).encode()))
            return
        if cannot:
            raise Mistaken("\n".join(cannot))
        warnings = [
            *preflight.notices(new, parsed.listens, parsed.backlog),
            *server_hints.of(new, parsed.listens, typed=False),
        ]
        notices += server_hints.drain_limits(new)
        notices = list(dict.fromkeys((*running.notices, *notices)))
        for index, each in enumerate(bound, added):
            _send(line, f"listener {index}", each.socket.fileno())
        if new.policy.workers_accept:
            siblings = pair(bound, parsed.listens, notices.append, _ALONE)
            reserved = reserve(bound)
            bound += (*siblings.values(), *reserved.values())
            for kind, found in (("twin", siblings), ("reserved", reserved)):
                for index, each in found.items():
                    _send(line, f"{kind} {added + index}", each.socket.fileno())
        _send(line, "differences", _memfd("\n".join(_changes(running, new)).encode()))
        new = replace(new, notices=tuple(notices), warnings=tuple(warnings))
        _send(line, "settings", _memfd(dump(new)))


def _changes(running: Settings, new: Settings) -> list[str]:
    """Return a line for each setting that differs."""
    return [escape(each) for each in changes(running, new)]


def _control(running: Settings, parsed: ParsedOptions) -> Iterator[str]:
    """Yield a line if the control socket would move."""
    if running.control is None:
        return  # there is none, perhaps because its bind failed
    was, path = running.control.address.removeprefix("unix:"), parsed.control
    if path is None:
        # The usual path depends on the user, and on the other instances of that time.
        usual = control_path.folders(os.environ, os.geteuid())
        path = was if was.startswith(tuple(f"{each}/" for each in usual)) else "the usual path"
    if path != was:
        yield f"control: {was} -> {path or 'none'}"


def _listeners(
    present: Sequence[ListenerSettings],
    parsed: ParsedOptions,
    notice: Callable[[str], None],
    *,
    dry: bool,
) -> tuple[tuple[ListenerSettings, ...], list[Bound]]:
    """Compute the new list of listeners, and bind the added ones; return the list and the sockets.

    A removed listener stays in the list, marked as removed.
    Raises Refusal with each listener that cannot be bound; then no new socket stays bound.
    """
    kept: dict[int, ListenerSettings] = {}
    added: dict[int, list[Bound]] = {}
    refused: list[Refusal] = []
    earlier: dict[str, Listen] = {}
    # UNIX paths come last: we may be killed while a host name is resolved (config_reader.py), and
    # then no process would remove their files.
    paths_last = sorted(enumerate(parsed.listens), key=lambda each: each[1].path is not None)
    for number, listen in paths_last:
        try:
            matching = _matching(present, listen, notice)
            have = {each.address for each in matching.values()}
            if listen.passed is None and not listen.port_is_chosen:
                for address in have:
                    refuse_twice(address, listen, earlier)
            kept.update(matching)
            earlier |= dict.fromkeys(map(place, have), listen)
            if any(each.text == listen.text for each in present if not each.removed):
                continue  # unchanged: a host name is not resolved again, port 0 keeps its number
            if any(each.foreign and listen.means(each.address) for each in matching.values()):
                continue  # as at a start, the argument means the passed sockets alone
            if listen.passed is not None:
                raise UsageError(
                    f"{listen.text}: sockets are passed only at a start, so this {RESTART}"
                )
            found = bind_all(
                [listen],
                parsed.backlog,
                notice=notice,
                have=have,
                earlier=earlier,
                alone=_ALONE if parsed.settings.mode.workers_accept else None,
                dry=dry,
            )
            earlier |= {place(each.settings.address): listen for each in found}
            added[number] = found
        except Refusal as error:
            refused.append(error)
    bound = [each for number in sorted(added) for each in added[number]]
    if len(present) + len(bound) > _MOST_LISTENERS:
        refused.append(
            UsageError(f"more than {_MOST_LISTENERS} listeners since the start, so this {RESTART}")
        )
    if refused:
        discard_all(bound)
        raise Mistaken("\n".join(escape(str(each)) for each in refused))
    places = [
        kept[index] if index in kept else replace(each, removed=True)
        for index, each in enumerate(present)
    ]
    return (*places, *(each.settings for each in bound)), bound


def _matching(
    present: Sequence[ListenerSettings], listen: Listen, notice: Callable[[str], None]
) -> dict[int, ListenerSettings]:
    """Return the bound listeners that match an argument, by index."""
    living = {index: each for index, each in enumerate(present) if not each.removed}
    same = {index: each for index, each in living.items() if each.text == listen.text}
    if same or listen.passed is not None:
        return same
    wanted = {place(each) for each in addresses_of(listen, notice)}
    found = {
        index: replace(each, **listen.settings)
        for index, each in living.items()
        if place(each.address) in wanted or (each.foreign and listen.means(each.address))
    }
    if any(options_in(each.text) != options_in(living[n].text) for n, each in found.items()):
        notice(f"{listen.text}: bound already; its options after the ? take effect at a restart")
    return found


def _memfd(content: bytes) -> int:
    return inherited.memory_file("answer", content)


def _send(line: socket.socket, what: str, fd: int) -> None:
    # send_fds() ignores MSG_NOSIGNAL (CPython 3.11).  That does no harm: Python ignores SIGPIPE.
    socket.send_fds(line, [what.encode()], [fd])


if __name__ == "__main__":
    sys.exit(main())
