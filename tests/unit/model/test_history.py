"""What is remembered for people: so many reloads and crashes, the newest last."""

from __future__ import annotations

from dataclasses import replace

from socketprotector.model.history import (
    CRASHES,
    DRY_RUNS,
    HEALTH_CHANGES,
    RECENT,
    RELOADS,
    Crash,
    History,
    Reload,
)


def crash(worker: int) -> Crash:
    return Crash(1.0 * worker, 1, worker, 0, 1000 + worker, "was killed by SIGSEGV", "serving")


def test_the_last_crashes_are_kept_and_all_of_them_are_counted() -> None:
    history = History()
    for worker in range(1, CRASHES + 6):
        history = history.with_crash(crash(worker))

    assert history.crashes == tuple(crash(worker) for worker in range(6, CRASHES + 6))
    assert history.crashed == CRASHES + 5
    assert history.reloads == ()


def test_a_reload_runs_and_then_has_an_outcome() -> None:
    begun = History().reload_began(2, 10.0)
    assert begun.reloads == (Reload(2, began_at=10.0),)
    assert begun.reloads[0].result == "running"

    ended = begun.reload_ended(2, "failed", "not ready within 1m", 70.0)

    assert ended.reloads == (Reload(2, "failed", "not ready within 1m", 10.0, 70.0),)


def test_the_last_reloads_are_kept() -> None:
    history = History()
    for generation in range(2, RELOADS + 5):
        history = history.reload_began(generation, 1.0).reload_ended(generation, "reloaded", "", 2)

    assert [each.generation for each in history.reloads] == list(range(5, RELOADS + 5))


def test_an_outcome_changes_its_own_reload_and_no_other() -> None:
    history = History().reload_began(2, 1.0).reload_ended(2, "reloaded", "", 2.0)

    later = history.reload_began(3, 3.0).reload_ended(3, "failed", "it exited", 4.0)

    assert later.reloads == (*history.reloads, Reload(3, "failed", "it exited", 3.0, 4.0))


def test_an_outcome_without_a_beginning_is_remembered_too() -> None:
    """A generation that could not even be opened."""
    history = History().reload_ended(4, "failed", "./daemon: No such file", 5.0)

    assert history.reloads == (Reload(4, "failed", "./daemon: No such file", 5.0, 5.0),)


def test_a_rolled_back_reload_is_one_that_failed() -> None:
    history = History().reload_began(2, 1.0).reload_ended(2, "reloaded", "", 2.0)

    assert history.reload_ended(2, "failed", "it exited", 3.0).reloads == (
        Reload(2, "failed", "it exited", 1.0, 3.0),
    )


def test_a_crash_in_a_dry_run_is_none_of_what_serves() -> None:
    crashed = crash(7)
    history = History().dry_run_began(crashed.generation, 1.0)

    assert history.with_crash(crashed) is history
    assert history.with_crash(replace(crashed, generation=2)).crashed == 1
    verdict = history.dry_run_ended(crashed.generation, "failed", "exited with status 1", 2.0)
    assert verdict.with_crash(crashed) is verdict


def test_earlier_dry_runs_are_kept() -> None:
    history = History()
    for generation in range(2, DRY_RUNS + 7):
        history = history.dry_run_began(generation, 1.0)
        history = history.dry_run_ended(generation, "failed", "it exited", 2.0)

    found = [each["generation"] for each in history.entries()]
    assert found == list(range(7, DRY_RUNS + 7))
    assert history.dry_run == Reload(DRY_RUNS + 6, "failed", "it exited", 1.0, 2.0)


def test_last_words_are_kept_of_recent_reloads_and_dry_runs_alone() -> None:
    history, why = History(), "it exited; its last words:\nModuleNotFoundError"
    for generation in range(2, RECENT + 4):
        history = history.reload_ended(generation, "failed", why, 1.0)
        history = history.dry_run_began(100 + generation, 2.0)
        history = history.dry_run_ended(100 + generation, "failed", why, 3.0)

    for kind in ("reload", "dry-run"):
        reasons = [each["reason"] for each in history.entries() if each["kind"] == kind]
        assert reasons[-RECENT:] == [why] * RECENT
        assert reasons[0] == "it exited"


def test_a_change_of_health_is_noted_once() -> None:
    history = History().health_changed(1, "healthy", "", 1.0)
    assert history.health == ()

    history = history.health_changed(1, "unhealthy", "500", 2.0)
    again = history.health_changed(1, "unhealthy", "500", 3.0)  # by the program after a restart
    assert again is history
    history = history.health_changed(1, "healthy", "", 4.0)
    history = history.health_changed(1, "unhealthy", "501", 5.0)
    history = history.health_changed(2, "unhealthy", "501", 6.0)  # by the next release

    assert history.health == (
        Reload(1, "unhealthy", "500", 2.0, 2.0),
        Reload(1, "healthy", "", 4.0, 4.0),
        Reload(1, "unhealthy", "501", 5.0, 5.0),
        Reload(2, "unhealthy", "501", 6.0, 6.0),
    )


def test_health_that_goes_up_and_down_displaces_no_reload() -> None:
    history = History().reload_ended(2, "reloaded", "", 1.0)
    for at in range(2, HEALTH_CHANGES + 10):
        history = history.health_changed(2, ("healthy", "unhealthy")[at % 2], "500", at)

    first, *others = history.entries()
    assert first == {
        "kind": "reload",
        "generation": 2,
        "result": "reloaded",
        "reason": "",
        "began_at": 1.0,
        "ended_at": 1.0,
    }
    assert len(others) == HEALTH_CHANGES
    assert others[-1]["began_at"] == others[-1]["ended_at"] == HEALTH_CHANGES + 9


def test_entries_of_all_kinds_are_in_the_order_in_which_they_began() -> None:
    history = History().health_changed(1, "unhealthy", "500", 3.0).dry_run_began(2, 2.0)
    history = history.dry_run_ended(2, "passed", "", 4.0).reload_began(3, 5.0)
    history = history.reload_ended(4, "failed", "no such file", 1.0)

    found = [(each["kind"], each["generation"], each["result"]) for each in history.entries()]
    assert found == [
        ("reload", 4, "failed"),
        ("dry-run", 2, "passed"),
        ("health", 1, "unhealthy"),
        ("reload", 3, "running"),
    ]
