"""Lists the differences between two settings, and the differences that need a restart.

The list has the names of variables and of the program.  The values of variables and the arguments
of the command may be secret, so the list omits them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter

from ..model import probe_spec
from ..model.policy import Policy
from ..model.settings import Identity, ListenerSettings, Settings
from .listen_spec import options_in
from .options import OPTIONS, STAYS

RESTART = "needs a restart"


def changes(old: Settings, new: Settings) -> Iterator[str]:
    """Yield the changes of a reload: `workers: 2 -> 4`, `listen: + tcp:0.0.0.0:81`, `env: + A`."""
    yield from _differs("release", old.release or "none", new.release or "none")
    yield from _rollout(old.policy, new.policy)
    yield from _options(old, new, stays=False)
    yield from _differs("ready", old.ready_text(), new.ready_text())
    if old.ready_check != new.ready_check:
        yield "ready: another check"  # the command of the check may be secret
    yield from _check_change("health", old.health, new.health)
    yield from _check_change("settle-check", old.policy.settle_check, new.policy.settle_check)
    yield from _differs("retire-after", _share(old), _share(new))
    yield from _command((*old.executed[:1], *old.command), (*new.executed[:1], *new.command))
    was, will = ({**dict(each.limits), "nice": each.nice} for each in (old, new))
    for name in dict.fromkeys((*was, *will)):
        yield from _differs(f"limit.{name}", was.get(name, "none"), will.get(name, "none"))
    before, after = dict(old.environment), dict(new.environment)
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            mark = "-" if name not in after else "+" if name not in before else "changed"
            yield f"env: {mark} {name}"
    yield from dict.fromkeys(_listeners(old.listeners, new.listeners))


def _rollout(old: Policy, new: Policy) -> Iterator[str]:
    yield from _differs("reload-order", old.order.name, new.order.name)
    yield from _differs("surge", old.surge_text, new.surge_text)
    before, after = (each.canary.described if each.canary else "none" for each in (old, new))
    yield from _differs("canary", before, after)


def _check_change(key: str, old: str, new: str) -> Iterator[str]:
    """Yield the change of a check, without its command."""
    check = f"{probe_spec.CHECK}:"
    if old != new and old.startswith(check) and new.startswith(check):
        yield f"{key}: another check"
    else:
        was, will = (probe_spec.CHECK if e.startswith(check) else e or "none" for e in (old, new))
        yield from _differs(key, was, will)


def _share(settings: Settings) -> str:
    limits = settings.worker_limits
    spread = f"+-{limits.spread}" if limits.spread else ""
    return f"{limits.connections or 'never'}{spread}"


def _command(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """Yield the change of the command, without arguments, which may be secret."""
    if old[:1] != new[:1]:
        yield f"command: {old[0]} -> {new[0]}"
    elif old != new:
        yield "command: other arguments"


def forbidden(old: Settings, new: Settings) -> Iterator[str]:
    """Yield the changes that need a restart."""
    return _options(old, new, stays=True)


def _options(old: Settings, new: Settings, *, stays: bool) -> Iterator[str]:
    for option in OPTIONS:
        if option.field and (option.at_reload == STAYS) == stays:
            before, after = map(attrgetter(option.field), (old, new))
            if isinstance(before, Identity) and isinstance(after, Identity):
                # Compare only the user and group, which the options name.  The other fields are
                # read at the start, and are kept.
                after = replace(after, groups=before.groups, home=before.home, shell=before.shell)
            if before != after:
                yield from _differs(option.key, option.shown(before), option.shown(after))


def _differs(key: str, before: object, after: object) -> Iterator[str]:
    if before != after:
        yield f"{key}: {before} -> {after}"


def _listeners(old: Sequence[ListenerSettings], new: Sequence[ListenerSettings]) -> Iterator[str]:
    for index, each in enumerate(new):
        was = index < len(old) and not old[index].removed
        if was and each.removed:
            yield f"listen: - {each.address}"
        elif not was and not each.removed:
            yield f"listen: + {each.address}"
        elif was and old[index].text != each.text:
            before, after = old[index].text, each.text
            # The bound socket keeps its options.
            late = " (options: at a restart)" if options_in(before) != options_in(after) else ""
            yield f"listen: {before} -> {after}{late}"
