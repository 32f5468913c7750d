"""Binds all listeners on the operator's command line, or none.

Runs in the launching process only, so that errors appear on the operator's terminal before
anything has changed.

Source: bind(2), tcp(7), ipv6(7).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from ..model.errors import Refusal, SystemRefused, UsageError
from ..model.lazy_dataclass import frozen
from ..model.settings import ListenerSettings
from ..system import reuseport, socket_copy, socket_file
from ..system.cleanup import on_error
from ..system.sock_diag import listening
from ..system.unix_listener import remove_file
from . import port_owner, socket_options
from .bind_unix import bind_unix, give_away, reapply_options
from .listen_spec import Listen

#: How often to try one port for two sockets: another program may take it between the two binds.
_SAME_PORT_TRIES = 16
_IP = (socket.AF_INET, socket.AF_INET6)
#: A family, and the IP address or (AF_UNIX) the path.
_Address = tuple[socket.AddressFamily, str]
#: Returns why a UNIX path can have one socket only, and what helps; "" if it can have more.
Alone = Callable[[Listen, str], str]
_HINTS = {
    errno.EACCES: "a port this low needs root or CAP_NET_BIND_SERVICE: start as root with "
    "--user, or choose another port",
    errno.EADDRNOTAVAIL: "no interface has it: add ?freebind=1 if one will",
}


@frozen
class Bound:
    """A listening socket with its settings."""

    socket: socket.socket
    settings: ListenerSettings
    left: bool = False  # from the previous protector: the service manager kept it

    def discard(self) -> None:
        """Close the socket, and remove the socket files that binding it made."""
        if not self.left:
            remove_file(self.settings)
            if self.settings.inode:
                socket_file.forget(self.settings.address.removeprefix("unix:"), self.socket)
        self.socket.close()


def discard_all(bound: Iterable[Bound]) -> None:
    """Discard all of these sockets."""
    for each in bound:
        each.discard()


def bind_all(
    listens: Sequence[Listen],
    backlog: int,
    *,
    notice: Callable[[str], None],
    passed: Mapping[int, list[Bound]] | None = None,
    left: Mapping[str, Bound] | None = None,
    have: Collection[str] = (),
    released: Collection[str] = (),
    earlier: Mapping[str, Listen] | None = None,
    alone: Alone | None = None,
    dry: bool = False,
) -> list[Bound]:
    """Bind every address, in order, and listen.  Raises Refusal; then no socket stays open.

    The caller owns the returned sockets.

    notice: called with lines for the operator.
    passed: sockets from the service manager, by the index of the argument that uses them.
    left: sockets from the previous protector, by canonical address (stored_listeners.py).
    have: canonical addresses to leave out, because they are bound already.
    released: addresses that become free when the running protector ends, for a dry run.
    earlier: arguments before these, by place().
    alone: for workers that accept; see pair().
    dry: only check that the bind would work; the returned sockets are closed, except passed ones.
    """
    bound: list[Bound] = []
    earlier = dict(earlier or {})
    have = {place(each) for each in have}
    released = {place(each) for each in released}
    with on_error(discard_all, bound):
        for index, listen in enumerate(listens):
            found = (passed or {}).get(index)
            if found is None:
                addresses = [
                    address
                    for address in _addresses(listen, notice)
                    if place(canonical(*address, listen.port)) not in have
                ]
                for address in addresses if not listen.port_is_chosen else ():
                    refuse_twice(canonical(*address, listen.port), listen, earlier)
                own = None if dry else listen.backlog(backlog)
                found = _bind(listen, addresses, own, left or {}, released, alone)
            earlier |= {place(each.settings.address): listen for each in found}
            bound += (
                replace(each, settings=replace(each.settings, **listen.settings)) for each in found
            )
    if dry:
        for each in bound:
            if not each.settings.foreign:
                each.socket.close()
    return bound


def pair(
    bound: Sequence[Bound],
    listens: Sequence[Listen],
    notice: Callable[[str], None],
    alone: Alone,
) -> dict[int, Bound]:
    """Prepare sockets for workers that accept; return a second socket for each, by index.

    The caller owns the second sockets.  The settings of a second socket replace those of the first:
    even a socket from the fd store now has a file beside its path.  See reuseport.py, and
    socket_file.py for UNIX sockets.

    listens: the arguments of these sockets.
    notice: called with a line for each address that cannot have a second socket.
    alone: returns why a path can have only one socket.

    O_NONBLOCK is set here and never again, because workers share the open file description with
    this flag.  A passed socket keeps its own flag.
    """
    found = {}
    by_text = {each.text: each for each in listens}
    for place, each in enumerate(bound):
        foreign = each.settings.foreign
        try:
            if not foreign:
                each.socket.setblocking(not each.settings.nonblock)
            elif why := _kept_from(each.socket, bound):
                notice(_alone(each, why))
                reuseport.steer_if_can(each.socket)  # an earlier protector may have left the group
                continue
            if each.settings.inode and not foreign:
                path = each.settings.address.removeprefix("unix:")
                if why := alone(by_text[each.settings.text], path):
                    notice(_alone(each, why))
                    continue
                socket_file.keep_file(path, each.socket)
                rights, backlog = socket_file.rights_of(path), each.settings.backlog
                sibling = socket_file.bind(path, backlog, rights, give_away)
                each = replace(each, settings=replace(each.settings, beside=True))
            elif (made := reuseport.make(each.socket)) is not None:
                sibling = made
            else:
                continue
        except OSError as error:
            notice(_alone(each, str(error.strerror)))
            continue
        sibling.setblocking(os.get_blocking(each.socket.fileno()))
        found[place] = Bound(sibling, each.settings)
    return found


def reserve(bound: Iterable[Bound]) -> dict[int, Bound]:
    """Bind sockets that serve no client, for a hold and probes; return them by index.

    The caller owns the sockets.  If a listener has no such socket, a hold reports why.  They are
    bound now, because the process may later run as another user.  That user cannot bind a port
    below 1024, nor share an address with this user's sockets (SO_REUSEPORT in socket(7)).
    """
    found = {}
    for place, each in enumerate(bound):
        if each.settings.foreign or each.socket.family == socket.AF_UNIX:
            continue
        with suppress(OSError):
            third = reuseport.reserve(each.socket, each.socket.getsockname())
            found[place] = Bound(third, each.settings)
    return found


def _alone(one: Bound, why: str) -> str:
    return (
        f"{one.settings.address}: no second socket ({why}). Servers that close "
        "accepted-but-unread connections may drop a few at each reload"
    )


def _kept_from(given: socket.socket, bound: Sequence[Bound]) -> str:
    """Return why a passed socket may not share its address; "" if it may.

    The unit must have `ReusePort=yes`, and all sockets of the group must be ours.  If a leftover
    socket of an earlier protector still listens, positions in the group would be wrong.
    """
    if given.family not in _IP:
        return ""
    if not given.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        return "it was passed in without ReusePort=yes"
    known = {os.fstat(each.socket.fileno()).st_ino for each in bound}
    if not listening(given.family, given.getsockname()[1]).keys() <= known:
        return "another program listens on that port"
    return ""


def could_pair(bound: Sequence[Bound]) -> set[int]:
    """Return the indexes of sockets that pair() would pair, as far as --check can know."""
    return {
        place
        for place, each in enumerate(bound)
        if not each.settings.foreign
        or (
            each.socket.family in _IP
            and each.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        )
    }


def _addresses(listen: Listen, notice: Callable[[str], None]) -> list[_Address]:
    """Return the addresses that a LISTEN argument means."""
    if listen.path is not None:
        return [(socket.AF_UNIX, listen.path)]
    if listen.host is None and listen.options.get("v6only") == "0" and _has_ipv6():
        return [(socket.AF_INET6, "::")]  # takes IPv4 too
    if listen.host is None:
        found = [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]
    else:
        found = _resolved(listen, listen.host)
    usable = [each for each in found if each[0] != socket.AF_INET6 or _has_ipv6()]
    if usable and usable != found:
        notice(f"{listen.text}: no IPv6 here; listening on {usable[0][1]} only")
    return usable or found


def _resolved(listen: Listen, host: str) -> list[_Address]:
    # Encode here: for text Python loads a codec, which takes memory and which ASCII does not need.
    name = host.encode() if host.isascii() else host
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "no valid name"
        raise SystemRefused(
            f"cannot resolve {host} in {listen.text}: {reason}; check the name, "
            "or write the address as a number"
        ) from error
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in answers))


def _has_ipv6() -> bool:
    """Return True if an IPv6 socket can be bound: the kernel may lack IPv6, or disable it."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        return error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
    return True


def addresses_of(listen: Listen, notice: Callable[[str], None]) -> list[str]:
    """Return the canonical addresses of an argument, as far as they are known before a bind."""
    return [canonical(family, host, listen.port) for family, host in _addresses(listen, notice)]


def canonical(family: int, host: str, port: int = 0) -> str:
    if family == socket.AF_UNIX:
        return f"unix:{host}"
    return f"tcp:[{host}]:{port}" if family == socket.AF_INET6 else f"tcp:{host}:{port}"


def _bind(
    listen: Listen,
    addresses: Sequence[_Address],
    backlog: int | None,
    left: Mapping[str, Bound],
    released: Collection[str],
    alone: Alone | None,
) -> list[Bound]:
    """Bind the addresses of one argument to the same port.  backlog None: only try it."""
    for tries_left in reversed(range(_SAME_PORT_TRIES)):
        bound: list[Bound] = []
        port = listen.port
        try:
            for family, host in addresses:
                address = canonical(family, host, port)
                here = place(address) if released else address
                free = not any(_overlap(here, other) for other in released)
                each = left.get(address) or _bind_one(
                    listen, family, host, port, backlog, free=free, alone=alone
                )
                bound.append(each)
                if listen.port_is_chosen and backlog is not None:  # in a dry run port 0 stays 0
                    port = each.socket.getsockname()[1]
        except OSError as error:
            for each in bound:
                each.socket.close()
            taken = error.errno == errno.EADDRINUSE and listen.port_is_chosen and bound
            if not (taken and tries_left):
                raise _cannot_bind(listen, host, port, error) from error
        else:
            return bound
    raise AssertionError("the last try returns or raises")


def place(address: str) -> str:
    """Return a canonical address with symbolic links in its path resolved."""
    path = address.removeprefix("unix:")
    if path == address or path.startswith("@"):
        return address
    folder, name = os.path.split(path)
    return f"unix:{os.path.join(os.path.realpath(folder), name)}"


def refuse_twice(address: str, listen: Listen, earlier: Mapping[str, Listen]) -> None:
    """Raise UsageError if an earlier argument has the same address, or its port on all addresses.

    Without this check, the error would name our own process as the owner, and a dry run would see
    no error.  earlier: arguments by place(), which is slow: compute it once for each address.
    """
    here = place(address)
    for other in earlier.keys() & {here} if here.startswith("unix:") else earlier:
        its = earlier[other]
        if _overlap(here, other) and not {*listen.options, *its.options} & {"device"}:
            why = f"both are {here}" if here == other else f"{here} and {other} overlap"
            raise UsageError(
                f"cannot listen on {listen.text} beside {its.text}: {why}; leave one of them out"
            )


def _overlap(one: str, other: str) -> bool:
    """Return whether two addresses, in the form of place(), overlap."""
    if one == other or "unix:" in (one[:5], other[:5]):
        return one == other
    (host, _, port), (its_host, _, its_port) = one.rpartition(":"), other.rpartition(":")
    any_host = "tcp:[::]" if host.startswith("tcp:[") else "tcp:0.0.0.0"
    same_family = host.startswith("tcp:[") == its_host.startswith("tcp:[")
    return same_family and port == its_port and any_host in (host, its_host)


def reuse(left: Bound, listen: Listen, backlog: int) -> Bound:
    """Set up an inherited listening socket like a newly bound one.

    Raises OSError, which names an option that cannot be set, and Refusal.
    """
    used = left.socket
    used.setblocking(False)
    if listen.path is not None:
        socket_copy.reapply_options(used, used)
        return replace(left, settings=reapply_options(used, listen, listen.path, backlog))
    with _made(listen, socket.AddressFamily(used.family)) as fresh:
        socket_copy.reapply_options(used, fresh)
    used.listen(backlog)
    return left


def _bind_one(
    listen: Listen,
    family: socket.AddressFamily,
    host: str,
    port: int,
    backlog: int | None,
    *,
    free: bool = True,
    alone: Alone | None = None,
) -> Bound:
    if family == socket.AF_UNIX and not free:
        unbound = socket.socket(family, socket.SOCK_STREAM)
        return Bound(unbound, ListenerSettings(canonical(family, host)))
    if family == socket.AF_UNIX:
        beside = alone is not None and not alone(listen, host)
        return Bound(*bind_unix(listen, host, backlog, beside=beside))
    sock = _made(listen, family)
    with on_error(sock.close):
        if not free:
            pass  # the options could be set; a bind cannot be tried before the port is free
        elif port or backlog is None:
            sock.bind((host, port))
        else:
            # Bind by number.  A socket that was bound to port 0 gets another port if a worker shuts
            # it down and it listens again (SOCK_BINDPORT_LOCK, tcp_set_state() in net/ipv4/tcp.c).
            # Both sockets here may have the port, because neither listens.
            with _made(listen, family) as chooser:
                chooser.bind((host, 0))
                port = chooser.getsockname()[1]
                sock.bind((host, port))
        if backlog is not None:
            reuseport.prepare(sock)
            sock.listen(backlog)
    return Bound(sock, ListenerSettings(canonical(family, host, port)))


def _made(listen: Listen, family: socket.AddressFamily) -> socket.socket:
    """Return an unbound socket with the argument's options.  Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    with on_error(sock.close):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        socket_options.put(sock, listen.options)
        sock.setblocking(False)
    return sock


def _cannot_bind(listen: Listen, host: str, port: int, error: OSError) -> Refusal:
    what = f"cannot listen on {listen.text} ({host} port {port}): {error.strerror}"
    if isinstance(error, socket_options.Unsettable):
        hint = error.hint
    elif error.errno == errno.EADDRINUSE:
        hint = port_owner.of_port(host, port)
    else:
        hint = _HINTS.get(error.errno or 0, "check the address and its options")
    return SystemRefused(f"{what}; {hint}")
