"""The command line of socketprotector-exporter.

Every error is one line: what failed, where, and how to fix it.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import select
import socket
import ssl
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from socketprotector import __version__
from socketprotector.ctl.api import (
    Answering,
    Refusal,
    SystemRefused,
    UsageError,
    discovery,
    env_file,
    escape,
    in_one_line,
    keep_exit_status,
    open_missing_standard_streams,
    whole,
)

from .ending import Ending, start_thread

if TYPE_CHECKING:
    from .web import Page

NAME = "socketprotector-exporter"
DEFAULT = "127.0.0.1:9517"
#: The packages of the extra `web`; the extra `exporter` installs only the first.
_FROM_ELSEWHERE = ("prometheus_client", "starlette", "uvicorn")
#: For mallopt(3): larger blocks of memory go back to the system as soon as they are free.
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 128 * 1024


class _CommandLine(Answering, click.Command):
    """The exporter's command."""


@click.command(
    cls=_CommandLine,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.option(
    "--name",
    multiple=True,
    shell_complete=lambda _, __, begun: discovery.names_with_prefix(begun),
    help="The instance with this name; repeatable.",
)
@click.option(
    "--control",
    multiple=True,
    metavar="PATH",
    type=click.Path(),
    help="The instance with this control socket; repeatable.",
)
@click.option(
    "--all",
    "all_instances",
    is_flag=True,
    help="All instances, also those started later.  [default]",
)
@click.option("--listen", default=DEFAULT, metavar="HOST:PORT", help="Address to listen on.")
@click.option(
    "--tls-cert",
    metavar="FILE",
    type=click.Path(),
    help="Serve HTTPS with this certificate chain (PEM).",
)
@click.option(
    "--tls-key",
    metavar="FILE",
    type=click.Path(),
    help="The certificate's private key, if it is in a separate file.",
)
@click.option(
    "--token",
    metavar="FILE",
    type=click.Path(),
    help="Require the token in this file for /metrics (Authorization: Bearer).",
)
@click.option(
    "--agent",
    metavar="HOST:PORT",
    help="Serve HAProxy's agent-check at this address: whether to send clients to an instance.",
)
@click.option(
    "--web",
    metavar="HOST:PORT|PATH",
    help="Serve a live page at a loopback address or a UNIX socket (/PATH?mode=0660).",
)
@click.option(
    "--web-host",
    multiple=True,
    metavar="NAME",
    help="Another Host name of the page, for your own proxy; repeatable.",
)
@click.version_option(__version__, prog_name=NAME)
def _command(**given: Any) -> int:
    """Export the status of the SocketProtector instances on this machine, over HTTP:
    /metrics, /healthz, /readyz, /readyz/NAME.  docs/metrics.md lists the metrics.

    --agent tells HAProxy when to drain an instance: docs/fleet.md.
    --web shows all instances live in a browser: docs/metrics.md."""
    _ending.await_signals()
    if given["all_instances"] and (given["name"] or given["control"]):
        raise UsageError("--all with --name or --control: leave out --all, or the others")
    if given["web_host"] and given["web"] is None:
        raise UsageError("--web-host without --web: add --web ADDRESS")
    for name in given["name"]:
        if "/" in name or name in ("", ".", ".."):
            raise UsageError(f"--name {name!r}: a name, not a path; for a path use --control")
    try:
        from .agent import Agent
        from .collector import ProtectorCollector
        from .http import Server

        if given["web"] is not None:
            from .web import Page
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _FROM_ELSEWHERE:
            raise
        extra = "exporter" if given["web"] is None else "web"
        raise UsageError(
            f"{missing.replace('_', '-')} is not installed; pip install 'socketprotector[{extra}]'"
        ) from error
    address = _address("--listen", given["listen"])
    agent_address = None if given["agent"] is None else _address("--agent", given["agent"])
    tls = _tls(given["tls_cert"], given["tls_key"])
    if given["token"] is not None:
        _check_token(given["token"], given["listen"], address[0], tls)
    # Without duplicates: a repeated name would make two series with the same labels.
    names, paths = tuple(dict.fromkeys(given["name"])), tuple(dict.fromkeys(given["control"]))
    instances = ProtectorCollector(names, paths)
    with suppress(AttributeError):  # otherwise glibc would raise the limit at each large free()
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    with ExitStack() as opened:
        page = None
        if given["web"] is not None:
            try:
                with _ending.making:
                    page = Page(given["web"], given["web_host"], instances.paths)
                    _ending.remove_file = partial(_remove_file, page)
            except OSError as error:
                raise SystemRefused(f"--web {given['web']}: {error.strerror or error}") from error
            opened.callback(_remove_file, page)
        try:
            server = opened.enter_context(Server(address, instances, tls, given["token"]))
        except OSError as error:
            raise SystemRefused(f"--listen {given['listen']}: {error.strerror}") from error
        if agent_address is not None:
            try:
                agent = opened.enter_context(Agent(agent_address, instances))
            except OSError as error:
                raise SystemRefused(f"--agent {given['agent']}: {error.strerror}") from error
            start_thread("agent", agent.serve_forever)
            _say(f"answers agent-checks at {agent.where}")
        if page is not None:
            start_thread("page", page.run)
            _say(f"serves the page at {page.where}")
        _say(f"serves metrics at {server.url}/metrics")
        server.serve_forever()
    return 0


def _address(option: str, text: str) -> tuple[Any, ...]:
    host, colon, port = text.rpartition(":")
    if not colon or whole(port, 65535) is None:
        raise UsageError(f"{option} {text}: write HOST:PORT, as in {DEFAULT} or [::]:9517")
    try:
        found = socket.getaddrinfo(host.strip("[]") or "0.0.0.0", int(port), 0, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no name"
        raise UsageError(f"{option} {text}: {why}; give an address of this machine") from error
    return found[0][4]


def _tls(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    if cert is None:
        if key is not None:
            raise UsageError("--tls-key without --tls-cert: add --tls-cert FILE")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for option, file in (("--tls-cert", cert), ("--tls-key", key or cert)):
        try:
            env_file.refuse_kind(os.stat(file), file)  # opening a FIFO would wait for its writer
            with open(file, "rb"):
                pass
        except OSError as error:
            raise UsageError(f"{option} {file}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"{option} {error}") from error
    try:
        # With an empty password, because OpenSSL would otherwise ask for it on the terminal.
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError) as error:
        said = f"--tls-cert {cert}" + (f" --tls-key {key}" if key else "")
        raise UsageError(
            f"{said}: not a PEM certificate with its own key; the key must have no password"
        ) from error
    return context


def _check_token(file: str, listen: str, host: str, tls: ssl.SSLContext | None) -> None:
    """Raise UsageError for an unusable token, or an address at which others could read it."""
    from .token_file import read_token

    if tls is None and not ipaddress.ip_address(host).is_loopback:
        raise UsageError(
            f"--token {file}: others could read the token on its way to {listen}; give --tls-cert, "
            "or listen on a loopback address behind your own proxy"
        )
    read_token("--token", file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until TERM or INT ends the process; return the exit status of a failed start, or of help.

    arguments: the words of the command line; None: the process's own.
    """
    open_missing_standard_streams()
    keep_exit_status()
    try:
        return int(_command.main(arguments, prog_name=NAME, standalone_mode=False) or 0)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        message = in_one_line(error.format_message())
        _say(f"{message}; see --help")
        return error.exit_code
    except Refusal as error:
        _say(str(error))
        return error.status


def _say(text: str) -> None:
    # In one write, because several threads print.
    with suppress(OSError):  # the reader of stderr has exited; keep serving the page and metrics
        print(f"{NAME}: {escape(text)}\n", end="", file=sys.stderr, flush=True)


def _remove_file(page: Page) -> None:
    """Remove the page's file at the end; report a failure, unless writing to stderr would block."""
    try:
        page.remove_file()
    except OSError as error:
        if select.select([], [sys.stderr], [], 0)[1]:
            _say(f"cannot remove {error.filename}: {error.strerror}; remove it")


_ending = Ending()
