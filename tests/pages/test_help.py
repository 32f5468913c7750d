"""The examples of SocketProtector --help: each is run as it stands, then reloaded and stopped."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from socketprotector.launch.help_pages import EXAMPLES
from tests import needs
from tests.pages.namespaced import is_root, ran_script

#: The programs that the examples start; `web` stands for a server in Go or Rust.
PROGRAMS = f"""
cat >app.py <<'EOF'
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "6")])
    return [b"hello\\n"]
EOF
cat >web <<'EOF'
#!{sys.executable}
import http.server, signal, socket, threading
class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.wfile.write(b"HTTP/1.0 200 OK\\r\\n\\r\\nhello\\n")
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello, bind_and_activate=False)
server.daemon_threads = False
server.socket = socket.socket(fileno=3)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever(0.1)
server.server_close()
EOF
chmod +x web
cat >echo.py <<'EOF'
from socketprotector_client import serve
def hello(client, peer):
    client.recv(4096)
    client.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nhello\\n")
serve(hello)
EOF
"""
CLIENTS = (
    "http://127.0.0.1:8000/",
    "--unix-socket /run/web.sock http://web/",
    "http://127.0.0.1:4321/",
)


@is_root
@pytest.mark.parametrize(
    "example",  # pages have commands like the later ones
    [0, *(pytest.param(each, marks=pytest.mark.costly) for each in range(1, len(EXAMPLES)))],
)
def test_an_example_serves_reloads_and_stops(tmp_path: Path, example: int) -> None:
    if not shutil.which("curl"):
        needs.skip("curl")
    line = EXAMPLES[example]
    client = f"curl --silent --retry 9 --retry-connrefused {CLIENTS[example]}"
    behind = " &" if " -f " in line else ""

    said = ran_script(
        tmp_path,
        f"""{PROGRAMS}
(
{line}
){behind}
until socketprotectorctl ready >/dev/null 2>&1; do sleep 0.1; done
{client}
socketprotectorctl reload
{client}
socketprotectorctl stop && echo ended
""",
    )

    assert said.count("hello\n") == 2, said
    assert "reloaded: generation 2 is serving" in said
    assert "ended\n" in said
