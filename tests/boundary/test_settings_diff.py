"""What a reload would change, in words; and that no setting is forgotten there."""

from __future__ import annotations

from dataclasses import fields, replace

from socketprotector.launch.options import OPTIONS
from socketprotector.launch.settings_diff import changes, forbidden
from socketprotector.model.policy import Policy
from socketprotector.model.settings import Identity, Limits, ListenerSettings, Settings
from socketprotector.model.share import Canary
from tests.together import together

WEB, OTHER = ListenerSettings("tcp:0.0.0.0:80"), ListenerSettings("unix:/run/x")
SETTINGS = Settings(
    name="web",
    command=("/srv/web", "80"),
    directory="/srv",
    listeners=(WEB,),
    limits=(("nofile", 100),),
    environment=(("A", "secret"), ("B", "1")),
)


#: Fields that no option decides alone: compared in another way, or not settable.
NO_OPTIONS = {
    *{"command", "listeners", "limits", "nice", "environment", "watch"},
    *{"ready", "ready_after_s", "ready_fd", "ready_check", "ready_question"},
    *{"health", "policy.workers_accept", "policy.ready", "policy.settle_check"},
    *{"policy.stop_first", "policy.surge", "policy.surge_is_percent", "policy.canary"},
    *{"worker_limits.connections", "worker_limits.spread"},
    *{"pools", "nofile_soft", "batch", "outlives_terminal", "secret", "notify_folder"},
    *{"control", "notices", "warnings", "origin", "release", "release_wanted"},
}


def test_every_setting_is_an_options_or_known_to_be_none() -> None:
    parts = {"policy": Policy, "worker_limits": Limits}
    there = {each.name for each in fields(Settings)} - parts.keys()
    there |= {f"{name}.{each.name}" for name, kind in parts.items() for each in fields(kind)}
    told = [each.field for each in OPTIONS if each.field]

    assert sorted([*told, *NO_OPTIONS]) == sorted(there)


def test_nothing_is_reported_of_what_is_the_same() -> None:
    assert list(changes(SETTINGS, replace(SETTINGS))) == []
    assert list(forbidden(SETTINGS, replace(SETTINGS))) == []


def test_another_check_is_told_without_its_secrets() -> None:
    old, new = (replace(SETTINGS, health=f"check:curl {key}") for key in ("s3cret", "secr3t"))
    assert list(changes(old, new)) == ["health: another check"]


@together(
    ("new", "said"),
    [
        (replace(SETTINGS, workers=4), ["workers: 1 -> 4"]),
        (replace(SETTINGS, ready="after", ready_after_s=1.0), ["ready: notify -> after:1s"]),
        (replace(SETTINGS, health="http:/p"), ["health: none -> http:/p"]),
        (replace(SETTINGS, health="check:curl s3cret"), ["health: none -> check"]),
        (
            replace(SETTINGS, policy=Policy(settle_check="check:curl -u s3cret")),
            ["settle-check: none -> check"],
        ),
        (replace(SETTINGS, umask=0o077), ["umask: 0022 -> 0077"]),
        (replace(SETTINGS, env_file="/x"), ["env-file: none -> /x"]),
        (replace(SETTINGS, command=("/srv/new",)), ["command: /srv/web -> /srv/new"]),
        (replace(SETTINGS, command=("/srv/web", "s3cret")), ["command: other arguments"]),
        (
            replace(SETTINGS, policy=Policy(settle_s=0.5, stop_first=True)),
            ["reload-order: start-first -> stop-first", "settle: 0s -> 500ms"],
        ),
        (
            replace(SETTINGS, policy=Policy(surge=25, surge_is_percent=True)),
            ["reload-order: start-first -> rolling", "surge: none -> 25%"],
        ),
        (
            replace(SETTINGS, policy=Policy(canary=Canary(25, 90.0, 200))),
            ["canary: none -> 0.25% for 1m30s, at least 200"],
        ),
        (
            replace(SETTINGS, worker_limits=Limits(connections=9, spread=2, age_s=60.0)),
            ["max-age: 0s -> 1m", "retire-after: never -> 9+-2"],
        ),
        (replace(SETTINGS, drain_signal=3), ["drain-signal: TERM -> QUIT"]),
        (replace(SETTINGS, keep_env=("A", "B")), ["keep-env: all -> A,B"]),
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
        (
            replace(SETTINGS, listeners=(replace(WEB, text="web=80"),)),
            [f"listen: {WEB.text} -> web=80"],
        ),
    ],
)
def test_what_changes_is_reported_in_a_line_each(new: Settings, said: list[str]) -> None:
    assert list(changes(SETTINGS, new)) == said
    assert list(forbidden(SETTINGS, new)) == []


def test_an_argument_with_two_sockets_is_listed_once() -> None:
    old, new = (
        tuple(replace(WEB, address=each, text=text) for each in ("tcp:0.0.0.0:80", "tcp:[::]:80"))
        for text in ("80", "web=80?nodelay=1")
    )

    found = changes(replace(SETTINGS, listeners=old), replace(SETTINGS, listeners=new))

    assert list(found) == ["listen: 80 -> web=80?nodelay=1 (options: at a restart)"]


def test_a_listener_that_was_removed_before_is_no_change() -> None:
    gone = replace(SETTINGS, listeners=(replace(WEB, removed=True), OTHER))

    assert list(changes(gone, gone)) == []


def test_what_cannot_change_is_reported_apart() -> None:
    old = replace(SETTINGS, identity=Identity("web", 33, 33, (33,)))

    assert list(forbidden(old, replace(old, identity=Identity("web", 33, 33, (33, 4))))) == []
    assert list(forbidden(old, replace(SETTINGS, guarded=True, log_relay=False))) == [
        "guard: false -> true",
        "no-log-relay: false -> true",
        "user: web (group 33) -> none",
    ]
    assert list(changes(old, replace(SETTINGS, guarded=True))) == []
