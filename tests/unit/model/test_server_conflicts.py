"""Settings with which a known server starts, and serves no client or cannot be reloaded."""

from __future__ import annotations

from socketprotector.model import server_conflicts
from tests.together import together


def conflicts(
    command: str,
    *,
    after_s: float | None = None,
    stop_first: bool = False,
    tcp6: bool = False,
    files: str = "",
    **variables: str,
) -> str:
    words = command.split()
    found = server_conflicts.of(
        words[0],
        words,
        variables,
        after_s=after_s,
        stop_first=stop_first,
        tcp6=tcp6,
        files=files,
    )
    return "; ".join(found)


REUSES = "lets no client reach it"
FAILS = "lets each reload fail"


@together(
    ("words", "files", "said"),
    [
        ("--preload --reuse-port", "", REUSES),
        ("--preload --reuse-p", "", REUSES),
        ("--preload", "reuse_port\t=\tTrue  # fast\n", REUSES),
        ("--preload", "# reuse_port = True\nreuse_port = False\n", ""),
        ("--preload", "reuse_port = True\nreuse_port = False\n", ""),
        ("--preload --pid g.pid", "", FAILS),
        ("--preload --pi g.pid", "", FAILS),
        ("--preload -p g.pid", "", FAILS),
        ("--preload -pg.pid", "", FAILS),
        ("--preload --pid=g.pid", "", FAILS),
        ("--preload", "pidfile = '/run/g.pid'\n", FAILS),
        ("--preload", 'pidfile="g"\n', FAILS),
        ("--preload", "pidfile = None\n", ""),
        ("--preload", "pidfile = ''\n", ""),
        ("--preload", 'pidfile = os.environ.get("PF")\n', ""),
        ("--preload", "def hook(server):\n    pidfile = 'x'\n", ""),
        ("--preload --proxy-protocol --print-config --reload", "", ""),
    ],
)
def test_gunicorn_is_warned_of_what_keeps_it_from_serving_or_reloads(
    words: str, files: str, said: str
) -> None:
    advised = conflicts(f"gunicorn {words} app", files=files)

    assert said in advised
    assert bool(advised) is bool(said)
    assert conflicts(f"uvicorn {words} app", files=files) == ""


def test_a_pid_file_does_no_harm_if_the_old_server_ends_first() -> None:
    assert conflicts("gunicorn --pid g.pid app", stop_first=True) == ""


def test_nginx_is_warned_of_a_timer() -> None:
    assert "nginx counts as ready after 1s" in conflicts("nginx", after_s=1.0)
    assert conflicts("nginx") == conflicts("haproxy", after_s=1.0) == ""


def test_starlet_is_warned_of_on_an_ipv6_socket() -> None:
    for options in ("-s Starlet", "-sStarlet", "--server Starlet", "--server=Starlet"):
        command = f"plackup {options} app.psgi"
        assert "resets each client of an IPv6 socket" in conflicts(command, tcp6=True)
        assert conflicts(command) == ""
    assert "resets each client" in conflicts("plackup x", tcp6=True, PLACK_SERVER="Starlet")
    assert conflicts("plackup -s Starman x", tcp6=True, PLACK_SERVER="Starlet") == ""
    assert conflicts("plackup app.psgi", tcp6=True) == ""
