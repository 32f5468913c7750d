"""Later versions keep these options, and the requests of the control protocol.

Source: docs/compatibility.md.

A change that fails here needs a deprecation first.  A new option is added to the lists.
"""

from __future__ import annotations

from socketprotector.launch import socket_options
from socketprotector.launch.listen_spec import UNIX_OPTIONS
from socketprotector.launch.options import OPTIONS
from socketprotector.model.control_requests import COMMANDS, canary_of
from socketprotector.model.handoff_modes import MODES
from socketprotector.model.share import Canary, read_percent

#: Each option, and its default if that is not "absent" or a matter of the mode or the caller.
STABLE = """
handoff=connection backlog=4096 queue=256 busy-poll=200us name foreground guard pid-file ready
start-timeout=60s start-tries=3 reload-order=start-first surge=1 canary canary-for=60s
canary-at-least=0 settle=0 releases current deployer watch workers shell watchdog=0 retire-after=0
max-memory=0 max-age=0 chdir umask limit env env-file clear-env keep-env settle-check health
health-every=5s health-failures=3 health-timeout=2s drain-timeout=0 drain-spread=0
drain-signal=TERM max-draining=0 stop-timeout=30s stop-spread=0 kill-timeout=5s lame-duck=0
lame-duck-idle=0 log-file log-level=info verbose log-format=text log-prefix no-log-relay user
group worker-user require-user no-new-privs control-group status-group config check control
no-control version help help-all
"""
#: The options after the `?` of a TCP LISTEN.
OF_TCP = """
backlog congestion defer_accept device fastopen freebind keepalive mark nodelay nonblock priority
rcvbuf sndbuf tos transparent user_timeout v6only
"""

#: Each command of the control protocol with its arguments.  Those with ? are optional; of several
#: others exactly one is given.
STABLE_REQUESTS = """
status
history
reload dry_run? canary?
promote now?
deploy release expect? force? dry_run?
rollback expect?
releases
upgrade check?
stop quick?
lame-duck on
scale to by
hold seconds
release
replace generation pid
kill generation
log-level level
reopen
connections generation?
crashes
diff
events
"""


def test_options_keep_their_names_and_defaults() -> None:
    found = [
        f"{each.key}={each.default}" if isinstance(each.default, str | int) else each.key
        for each in OPTIONS
    ]

    assert found == STABLE.split()


def test_modes_keep_their_defaults() -> None:
    found = {name: (mode.workers, mode.ready, mode.ready_after_s) for name, mode in MODES.items()}

    assert found == {
        "connection": (1, "notify", None),
        "listener": (1, "any", 1.0),
        "stdio": (4, "notify", None),
        "legacy": (1, "notify", None),
    }


def test_requests_keep_their_arguments() -> None:
    found = []
    for name, command in COMMANDS.items():
        optional = {*command.arguments} - {command.required} if command.optional else {}
        found.append(
            " ".join([name, *(each + "?" * (each in optional) for each in command.arguments)])
        )

    assert found == STABLE_REQUESTS.strip().splitlines()
    canary = canary_of({"share": "5%", "for_s": 9, "at_least": 2})
    assert canary == Canary(read_percent("5%"), 9.0, 2)


def test_listeners_keep_their_options() -> None:
    assert [*socket_options.OPTIONS] == OF_TCP.split()
    assert UNIX_OPTIONS == ("backlog", "group", "mode", "nonblock", "user")
