"""nginx and HAProxy in front of a server: what clients see of it as they would in production.

Neither tries a failed request again unless that is asked for, so that each failure of the server
reaches a client.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.nginx import own_folders
from tests.running import eventually

_NGINX = """\
daemon off; {user} worker_processes 1; pid {folder}/pid; error_log {folder}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off; {own_folders}
    upstream server {{ server {server}; {kept} }}
    server {{
        listen 127.0.0.1:{port} backlog=1024; keepalive_requests 1000000;
        location / {{
            proxy_pass http://server; proxy_http_version {version}; proxy_set_header Connection "";
            proxy_set_header Host x; {strict}
        }}
    }}
}}
"""
_HAPROXY = """\
global
    maxconn 1000
defaults
    mode http
    timeout connect 30s
    timeout client 60s
    timeout server 60s
    {strict}
    {kept}
frontend web
    bind 127.0.0.1:{port} backlog 1024
    default_backend server
backend server
    server one {server}
"""


def _nginx(server: str, port: int, folder: Path, *, kept: bool, retries: bool) -> tuple[str, ...]:
    text = _NGINX.format(
        folder=folder,
        user="user root;" if os.geteuid() == 0 else "",
        own_folders=own_folders(folder),
        server=server,
        port=port,
        kept="keepalive 64;" if kept else "",
        version="1.1" if kept else "1.0",
        strict="" if retries else "proxy_next_upstream off;",
    )
    (folder / "proxy.conf").write_text(text, encoding="utf-8")
    return "nginx", "-c", str(folder / "proxy.conf"), "-e", "stderr"


def _haproxy(server: str, port: int, folder: Path, *, kept: bool, retries: bool) -> tuple[str, ...]:
    reuse = "http-reuse always" if kept else "option http-server-close\n    http-reuse never"
    text = _HAPROXY.format(
        server=server.replace("unix:", "unix@"),
        port=port,
        kept=reuse,
        strict="retry-on conn-failure empty-response" if retries else "retries 0",
    )
    (folder / "proxy.conf").write_text(text, encoding="utf-8")
    return "haproxy", "-db", "-f", str(folder / "proxy.conf")


PROXIES: dict[str, Callable[..., tuple[str, ...]]] = {"nginx": _nginx, "haproxy": _haproxy}


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@contextmanager
def proxied(
    name: str, server: str, port: int, folder: Path, *, kept: bool, retries: bool
) -> Iterator[None]:
    """Run a proxy at a port in front of a server.

    server: unix:PATH or HOST:PORT.  kept: it keeps connections to the server.  retries: it sends a
    request again whose connection ended without an answer.
    """
    assert shutil.which(name), f"{name} is not installed"
    command = PROXIES[name](server, port, folder, kept=kept, retries=retries)
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            eventually(lambda: _accepts(port), f"{name} accepts")
            yield
        finally:
            process.terminate()
            process.wait()
