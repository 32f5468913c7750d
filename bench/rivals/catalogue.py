"""The rivals.  Each has one entry, with all that the comparison needs.

Texts have {port} or {path} (where it listens), {folder} (its own), {release}, {number},
{status} and {word} (what this release is), {python}, {scripts}, {worker} and {tools}
(see running.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: Faults that a rival's kind does not have.
NO_START = ("slow",)


@dataclass(frozen=True)
class Rival:
    """How a rival is installed, started, reloaded and upgraded, and what its manual says."""

    name: str
    command: str
    version: str  # a command that prints it
    manual: str  # what its manual recommends, promises or excludes
    source: str  # of that
    reload: tuple[str, ...] = ("HUP",)  # steps, see running.steps
    upgrade: tuple[str, ...] = ("stop", "start")
    stop: str = "TERM"
    debian: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    at_path: str = ""  # its command on a UNIX socket; "": it has none here
    files: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    pid_file: bool = False  # {folder}/pid has its first process
    guarded: bool = False  # its supervisor is the child of its first process
    without: tuple[str, ...] = ()  # situations that it cannot have
    fronted: bool = False  # is always measured at a UNIX path behind nginx
    compared: bool = True  # False: it is only shown beside the others: see bench/README.md

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours-")


_LEAST_DOES = "the least that can replace workers: it checks no release, and waits for none"
_BEYOND_LEAST = (
    *("c64", "broken", "slow", "answers-500", "worker", "supervisor", "upgrade"),
    *("hog", "memory", "first"),
)
_STARTER_WORKER = "{worker} --fork 2 starter"
_CIRCUS = """\
[circus]
check_delay = 5
endpoint = ipc://{folder}/control
pubsub_endpoint = ipc://{folder}/events
[watcher:web]
cmd = {worker} fd:$(circus.sockets.web)
use_sockets = True
numprocesses = 2
copy_env = True
[socket:web]
"""
_SUPERVISORD = """\
[supervisord]
nodaemon = true
logfile = /dev/null
logfile_maxbytes = 0
pidfile = {folder}/supervisord.pid
[unix_http_server]
file = {folder}/control
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl = unix://{folder}/control
[fcgi-program:web]
command = {worker} fd:0
numprocs = 2
process_name = %%(process_num)d
"""
_PUMA = """\
workers 2
preload_app! false
"""
_UNICORN = """\
worker_processes 2
preload_app true
pid "{folder}/pid"
"""
_NGINX = """\
daemon off;
USER
worker_processes 2;
pid {folder}/pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    keepalive_requests 1000000;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    server {{ listen LISTEN; location / {{ return {status} "$pid {number} {word}"; }} }}
}}
{broken}
"""
_HAPROXY = """\
global
    stats socket {folder}/control mode 600 level admin expose-fd listeners
defaults
    mode http
    timeout client 60s
    timeout connect 5s
    timeout server 60s
frontend web
    bind LISTEN
    http-request return status {status} content-type text/plain lf-string "%pid {number} {word}"
{broken}
"""
_GUNICORN = "{scripts}/gunicorn --workers 2 --pid {folder}/pid --no-control-socket --bind "
_APP = " bench.rivals.programs.app:"
_UWSGI = (
    "uwsgi --plugin python3 --master --processes 2 --die-on-term --disable-logging "
    "--module bench.rivals.programs.app:wsgi --master-fifo {folder}/fifo --http-socket "
)
_OURS = (
    "{tools}/SocketProtector -f --guard --workers 2 --start-timeout 10s --env RELEASE={release} "
)
_OUR_MANUAL = (
    "`--guard` so that a kill of the protector loses no connection; `--ready http:/` so that a "
    "release which answers 500 never serves; it is asked for --start-timeout (60 s, here 10)"
)
_ROLLING = "--reload-order rolling --drain-timeout 10s "
_ROLLING_MANUAL = (
    _OUR_MANUAL + "; `--reload-order rolling`: one worker after the other, which needs "
    "--drain-timeout (here 10 s)"
)
#: What the order of a reload does not change.
_NOT_OF_ORDER = ("c64", "hog", "worker", "supervisor", "upgrade")
_TCP, _UNIX = "127.0.0.1:{port}", "unix:{path}"

ALL = (
    Rival(
        "direct",
        "{worker} --fork 2 listen:127.0.0.1:{port}",
        "{python} --version",
        "the worker of all supervisors of any program, on a listener of its own",
        "bench/rivals/programs/worker.py",
        reload=(),
        upgrade=(),
        without=("reload", "memory", "first", "supervisor", "upgrade"),
        compared=False,
    ),
    *(
        Rival(
            name,
            f"{{built}}/least {form}{{port}} {worker}",
            "{python} --version",
            _LEAST_DOES,
            "bench/least.c",
            without=_BEYOND_LEAST,
            at_path=f"{{built}}/least {form}{{path}} {worker}",
            compared=False,
        )
        for name, form, worker in (
            ("least", "", "{worker} fd:3"),
            ("least-rolling", "rolling ", "{worker} fd:3"),
            ("least-forward", "forward ", "{worker} library"),
        )
    ),
    Rival(
        "server-starter",
        "start_server --port=127.0.0.1:{port} -- " + _STARTER_WORKER,
        "start_server --version",
        "HUP starts a new program, and TERM ends the old one if the new one lives for --interval "
        "(1 s); a new program that exits is started again; no upgrade of start_server is described",
        "start_server(1)",
        debian=("libserver-starter-perl",),
        at_path="start_server --path={path} -- " + _STARTER_WORKER,
    ),
    Rival(
        "circus",
        "{scripts}/circusd {folder}/circus.ini",
        "{scripts}/circusd --version",
        "`use_sockets`, and `reload`, which restarts processes gracefully; nothing is promised to "
        "clients meanwhile",
        "circus.readthedocs.io, sockets and reload",
        reload=("run {scripts}/circusctl --endpoint ipc://{folder}/control reload web",),
        pip=("circus",),
        at_path="{scripts}/circusd {folder}/circus-unix.ini",
        files={
            "circus.ini": _CIRCUS + "host = 127.0.0.1\nport = {port}\n",
            "circus-unix.ini": _CIRCUS + "path = {path}\n",
        },
    ),
    Rival(
        "gunicorn-hup",
        _GUNICORN + _TCP + _APP + "wsgi",
        "{scripts}/gunicorn --version",
        "HUP loads the new code in new workers while the old ones are ended gracefully; it does "
        "not wait for the new ones",
        "gunicorn.org/signals",
        upgrade=("USR2", "answers", "old TERM"),
        pip=("gunicorn",),
        at_path=_GUNICORN + _UNIX + _APP + "wsgi",
        pid_file=True,
    ),
    Rival(
        "gunicorn-usr2",
        _GUNICORN + _TCP + _APP + "wsgi",
        "{scripts}/gunicorn --version",
        "USR2 starts a second master; the operator looks at it, then sends TERM to the old one",
        "gunicorn.org/signals",
        reload=("USR2", "answers", "old TERM"),
        upgrade=("USR2", "answers", "old TERM"),
        pip=("gunicorn",),
        at_path=_GUNICORN + _UNIX + _APP + "wsgi",
        pid_file=True,
    ),
    Rival(
        "uvicorn",
        "{scripts}/uvicorn --workers 2 --no-access-log --port {port}" + _APP + "asgi",
        "{scripts}/uvicorn --version",
        "HUP starts a replacement of each worker before it ends that one; its author measured "
        "about 0.02 % of requests lost",
        "Kludex/uvicorn #3023, #3028",
        pip=("uvicorn", "uvloop", "httptools"),
        at_path="{scripts}/uvicorn --workers 2 --no-access-log --uds {path}" + _APP + "asgi",
    ),
    Rival(
        "hypercorn",
        "{scripts}/hypercorn --workers 2 --bind " + _TCP + _APP + "asgi",
        "{python} -c \"import importlib.metadata as m; print(m.version('hypercorn'))\"",
        "HUP (0.18 and later) restarts the workers; the manual promises clients nothing",
        "pgjones/hypercorn #304, #233",
        pip=("hypercorn",),
        at_path="{scripts}/hypercorn --workers 2 --bind " + _UNIX + _APP + "asgi",
    ),
    Rival(
        "granian",
        "{scripts}/granian --interface asgi --workers 2 --port {port}" + _APP + "asgi",
        "{scripts}/granian --version",
        "HUP restarts the workers one after the other (--respawn-interval 3.5 s); the manual "
        "promises clients nothing",
        "granian --help; emmett-framework/granian #376",
        pip=("granian",),
        at_path="{scripts}/granian --interface asgi --workers 2 --uds {path}" + _APP + "asgi",
    ),
    Rival(
        "uwsgi-graceful",
        _UWSGI + _TCP,
        "uwsgi --version",
        "all workers end their requests and start again; clients wait in the backlog until then",
        "The Art of Graceful Reloading",
        upgrade=("HUP",),
        without=("keep-alive",),  # its http-socket closes each connection, and does not say so
        debian=("uwsgi-core", "uwsgi-plugin-python3"),
        at_path=_UWSGI + "{path}",
    ),
    Rival(
        "uwsgi-chain",
        _UWSGI.replace("--master ", "--master --lazy-apps ") + _TCP,
        "uwsgi --version",
        "with lazy-apps, one worker after the other is replaced, the next one when the last one "
        "accepts",
        "The Art of Graceful Reloading",
        reload=("write {folder}/fifo c",),
        upgrade=("HUP",),
        without=("keep-alive",),  # its http-socket closes each connection, and does not say so
        debian=("uwsgi-core", "uwsgi-plugin-python3"),
        at_path=_UWSGI.replace("--master ", "--master --lazy-apps ") + "{path}",
    ),
    Rival(
        "puma",
        "puma --config {folder}/puma.rb {programs}/config.ru",
        "puma --version",
        "a phased restart (USR1) replaces one worker after the other; at a hot restart (USR2) "
        "clients wait, and a release that cannot load ends it: use a process monitor",
        "puma, restart.md",
        reload=("USR1",),
        upgrade=("USR2",),
        debian=("puma",),
        at_path="puma --config {folder}/puma-unix.rb {programs}/config.ru",
        files={
            "puma.rb": _PUMA + 'bind "tcp://127.0.0.1:{port}"\n',
            "puma-unix.rb": _PUMA + 'bind "unix://{path}"\n',
        },
    ),
    Rival(
        "unicorn",
        "unicorn --config-file {folder}/unicorn.rb {programs}/config.ru",
        "unicorn --version",
        "USR2 starts a second master; QUIT ends the old one once the new one runs; "
        '"without losing any incoming connections"',
        "unicorn, SIGNALS",
        reload=("USR2", "answers", "old QUIT"),
        upgrade=("USR2", "answers", "old QUIT"),
        stop="QUIT",
        debian=("unicorn",),
        at_path="unicorn --config-file {folder}/unicorn-unix.rb {programs}/config.ru",
        files={
            "unicorn.rb": _UNICORN + 'listen "127.0.0.1:{port}"\n',
            "unicorn-unix.rb": _UNICORN + 'listen "{path}"\n',
        },
        without=("keep-alive",),  # it closes each connection
        pid_file=True,
    ),
    Rival(
        "nginx",
        "nginx -c {folder}/nginx.conf -e stderr",
        "nginx -v",
        "HUP checks the configuration and opens its files before new workers start; USR2, then "
        "WINCH and QUIT to the old master, replaces the binary",
        "nginx.org/en/docs/control.html",
        upgrade=("USR2", "answers", "old WINCH", "old QUIT"),
        stop="QUIT",
        debian=("nginx-light",),
        at_path="nginx -c {folder}/nginx-unix.conf -e stderr",
        files={
            "nginx.conf": _NGINX.replace("LISTEN", _TCP),
            "nginx-unix.conf": _NGINX.replace("LISTEN", _UNIX),
        },
        pid_file=True,
        without=NO_START,
    ),
    Rival(
        "haproxy",
        "haproxy -W -f {folder}/haproxy.cfg",
        "haproxy -v",
        "`expose-fd listeners`, and USR2 to the master, which runs itself again; without it about "
        "1 in 10,000 connections a second can fail at a reload",
        "haproxy, management.txt",
        reload=("USR2",),
        upgrade=("USR2",),
        stop="USR1",
        debian=("haproxy",),
        at_path="haproxy -W -f {folder}/haproxy-unix.cfg",
        files={
            "haproxy.cfg": _HAPROXY.replace("LISTEN", _TCP),
            "haproxy-unix.cfg": _HAPROXY.replace("LISTEN", "unix@{path} mode 666"),
        },
        without=NO_START,
    ),
    Rival(
        "supervisord",
        "{scripts}/supervisord -c {folder}/supervisord.conf",
        "{scripts}/supervisord --version",
        "an fcgi-program's processes share a socket that supervisord holds while one of them runs; "
        "they are restarted one by one here, as no order is described",
        "supervisord.org/configuration.html, [fcgi-program:x]",
        reload=(
            "run {scripts}/supervisorctl -c {folder}/supervisord.conf restart web:0",
            "run {scripts}/supervisorctl -c {folder}/supervisord.conf restart web:1",
        ),
        pip=("supervisor",),
        at_path="{scripts}/supervisord -c {folder}/supervisord-unix.conf",
        files={
            "supervisord.conf": _SUPERVISORD + "socket = tcp://127.0.0.1:{port}\n",
            "supervisord-unix.conf": _SUPERVISORD + "socket = unix://{path}\nsocket_mode = 0666\n",
        },
    ),
    Rival(
        "systemd-socket-activate",
        "systemd-socket-activate -l 127.0.0.1:{port} -E RELEASE={release} -E PYTHONPATH={root} "
        "{worker} --fork 2 fd:3",
        "systemd-socket-activate --version",
        '"for testing purposes"; it becomes the server, so a reload is a stop and a start',
        "systemd-socket-activate(1)",
        reload=("stop", "start"),
        debian=("systemd",),
        at_path="systemd-socket-activate -l {path} -E RELEASE={release} -E PYTHONPATH={root} "
        "{worker} --fork 2 fd:3",
    ),
    Rival(
        "tableflip",
        "{built}/flips tcp 127.0.0.1:{port} {folder}/pid",
        "dpkg-query -W -f ${{Version}} golang-github-cloudflare-tableflip-dev",
        "HUP starts the new program, which calls Ready(); otherwise Upgrade() returns an error",
        "github.com/cloudflare/tableflip",
        upgrade=("HUP",),
        debian=("golang-go", "golang-github-cloudflare-tableflip-dev"),
        at_path="{built}/flips unix {path} {folder}/pid",
        pid_file=True,
    ),
    Rival(
        "ours-connection",
        _OURS + "--ready http:/ " + _TCP + " -- {worker} library",
        "{tools}/SocketProtector --version",
        _OUR_MANUAL,
        "docs/modes.md, docs/probes.md",
        upgrade=("USR2",),
        at_path=_OURS + "--ready http:/ {unix} -- {worker} library",
        guarded=True,
    ),
    Rival(
        "ours-listener",
        _OURS + "--handoff listener --ready http:/ " + _TCP + " -- {worker} fd:3",
        "{tools}/SocketProtector --version",
        _OUR_MANUAL,
        "docs/modes.md, docs/probes.md",
        upgrade=("USR2",),
        at_path=_OURS + "--handoff listener --ready http:/ {unix} -- {worker} fd:3",
        guarded=True,
    ),
    Rival(
        "ours-connection-rolling",
        _OURS + _ROLLING + "--ready http:/ " + _TCP + " -- {worker} library",
        "{tools}/SocketProtector --version",
        _ROLLING_MANUAL,
        "docs/rollout.md",
        at_path=_OURS + _ROLLING + "--ready http:/ {unix} -- {worker} library",
        guarded=True,
        without=_NOT_OF_ORDER,
    ),
    Rival(
        "ours-listener-rolling",
        _OURS + _ROLLING + "--handoff listener --ready http:/ " + _TCP + " -- {worker} retiring:3",
        "{tools}/SocketProtector --version",
        _ROLLING_MANUAL + "; the worker retires at the end of its RETURN line",
        "docs/rollout.md",
        guarded=True,
        without=_NOT_OF_ORDER,
    ),
    Rival(
        "ours-c",
        _OURS + "--handoff listener --ready http:/ " + _TCP + " -- {built}/serve 3",
        "{tools}/SocketProtector --version",
        _OUR_MANUAL
        + "; the worker is bench/serve.c, which starts as fast as nginx's and HAProxy's",
        "docs/modes.md, docs/probes.md",
        upgrade=("USR2",),
        at_path=_OURS + "--handoff listener --ready http:/ {unix} -- {built}/serve 3",
        guarded=True,
        without=("c64", "hog"),
        compared=False,
    ),
    Rival(
        "ours-unix",
        "",
        "{tools}/SocketProtector --version",
        _OUR_MANUAL + "; `--handoff listener` at a UNIX path, behind nginx in every row",
        "docs/servers.md",
        upgrade=("USR2",),
        at_path=_OURS + "--handoff listener --ready http:/ {unix} -- {worker} fd:3",
        guarded=True,
        fronted=True,
    ),
    Rival(
        "ours-stdio",
        _OURS.replace("{release}", "release").replace("--workers 2", "--workers 8")
        + "--handoff stdio --chdir {folder}/current --settle 1s --settle-check http:/ "
        + _TCP
        + " -- {built}/answer",
        "{tools}/SocketProtector --version",
        "a program for each connection; `--settle-check http:/`, since no program runs before its "
        "client: the first clients of a broken release do fail",
        "docs/stdio.md",
        upgrade=("USR2",),
        at_path=_OURS.replace("{release}", "release").replace("--workers 2", "--workers 8")
        + "--handoff stdio --chdir {folder}/current --settle 1s --settle-check http:/ "
        "{unix} -- {built}/answer",
        guarded=True,
        without=(*NO_START, "keep-alive"),  # its program closes each connection
    ),
)
RIVALS = {each.name: each for each in ALL}


@dataclass(frozen=True)
class Quoted:
    """A rival that is not run, and why."""

    name: str
    says: str
    source: str
    why: str


QUOTED = (
    Quoted(
        "Envoy",
        "a hot restart loads everything before it takes the listeners; "
        "open connections are drained, not moved",
        "envoyproxy.io, hot restart",
        "`apt-get install envoy`: Unable to locate package",
    ),
    Quoted(
        "kamal-proxy",
        "`deploy` returns another status than 0 if the new instance fails its health check; "
        "traffic moves once it is healthy",
        "basecamp/kamal-proxy, README",
        "`apt-get install kamal-proxy`: Unable to locate package",
    ),
    Quoted(
        "socketmaster",
        "HUP starts a new server, waits for a set time, and sends QUIT to the old one if the new "
        "one has not exited",
        "zimbatm/socketmaster, README",
        "`apt-get install socketmaster`: Unable to locate package",
    ),
    Quoted(
        "einhorn",
        "an ACK, or 1 s of life, makes a worker count as up; then the old ones get USR2. "
        '"deprecated and is no longer being actively maintained"',
        "stripe/einhorn, README",
        "`apt-get install ruby-einhorn`: Unable to locate package",
    ),
)
