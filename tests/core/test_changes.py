"""What a reload would change, in words; and that no setting is forgotten there."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from socketprotector.model.policy import Policy
from socketprotector.model.settings import Identity, Limits, ListenerSettings, Settings
from socketprotector.model.settings_diff import changes, forbidden, known

WEB, OTHER = ListenerSettings("tcp:0.0.0.0:80"), ListenerSettings("unix:/run/x")
SETTINGS = Settings(
    name="web",
    command=("/srv/web", "80"),
    directory="/srv",
    listeners=(WEB,),
    limits=(("nofile", 100),),
    environment=(("A", "secret"), ("B", "1")),
)


def test_every_setting_is_told_of_or_known_to_be_nobodys_wish() -> None:
    # Of --handoff and --ready.
    by_another_name: dict[type, set[str]] = {Policy: {"workers_accept", "ready"}}
    for kind, told in known().items():
        there = {each.name for each in fields(kind)} - by_another_name.get(kind, set())
        assert told == there, kind


def test_nothing_is_told_of_what_is_the_same() -> None:
    assert list(changes(SETTINGS, replace(SETTINGS))) == []
    assert list(forbidden(SETTINGS, replace(SETTINGS))) == []


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (replace(SETTINGS, workers=4), ["workers: 1 -> 4"]),
        (replace(SETTINGS, ready="after", ready_after_s=1.0), ["ready: notify -> after:1s"]),
        (replace(SETTINGS, umask=0o077), ["umask: 0022 -> 0077"]),
        (replace(SETTINGS, env_file="/x"), ["env-file: none -> /x"]),
        (replace(SETTINGS, command=("/srv/new",)), ["command: /srv/web -> /srv/new"]),
        (replace(SETTINGS, command=("/srv/web", "s3cret")), ["command: other arguments"]),
        (
            replace(SETTINGS, policy=Policy(settle_s=0.5, stop_first=True)),
            ["settle: 0 s -> 0.5 s", "reload-order: start-first -> stop-first"],
        ),
        (replace(SETTINGS, worker_limits=Limits(age_s=60.0)), ["max-age: 0 s -> 60 s"]),
        (
            replace(SETTINGS, limits=(("core", 0),), nice=5),
            ["limit.nofile: 100 -> none", "limit.nice: 0 -> 5", "limit.core: none -> 0"],
        ),
        (
            replace(SETTINGS, environment=(("A", "other"), ("C", "2"))),
            ["env: changed A", "env: - B", "env: + C"],
        ),
        (
            replace(SETTINGS, listeners=(replace(WEB, removed=True), OTHER)),
            ["listen: - tcp:0.0.0.0:80", "listen: + unix:/run/x"],
        ),
    ],
)
def test_what_changes_is_told_in_a_line_each(new: Settings, said: list[str]) -> None:
    assert list(changes(SETTINGS, new)) == said
    assert list(forbidden(SETTINGS, new)) == []


def test_a_listener_that_was_removed_before_is_no_change() -> None:
    gone = replace(SETTINGS, listeners=(replace(WEB, removed=True), OTHER))

    assert list(changes(gone, gone)) == []


def test_what_cannot_change_is_told_apart() -> None:
    old = replace(SETTINGS, identity=Identity("web", 33, 33, (33,)))

    assert list(forbidden(old, replace(old, identity=Identity("web", 33, 33, (33, 4))))) == []
    assert list(forbidden(old, replace(SETTINGS, guarded=True))) == [
        "user: web (group 33) -> none",
        "guard: false -> true",
    ]
    assert list(changes(old, replace(SETTINGS, guarded=True))) == []
