"""Binds listeners: all of them, or none.

This runs in the launching process, so that errors appear on the operator's terminal before anything
has changed.  At a reload it runs in the process that reads the configuration (reload_child.py).

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
from ..system import reuseport, scoped, socket_copy, socket_file
from ..system.cleanup import on_error
from ..system.sock_diag import is_elsewhere, listening
from ..system.unix_listener import remove_file
from . import port_owner, socket_options
from .bind_unix import bind_unix, give_away, reapply_options
from .listen_spec import Listen

#: How many ports to try if two sockets need the same free port: between the two binds, another
#: program may take the port.
_SAME_PORT_TRIES = 16
_IP = (socket.AF_INET, socket.AF_INET6)
#: A family, and an IP address or (for AF_UNIX) a path.
_Address = tuple[socket.AddressFamily, str]
#: Returns why a UNIX path can have only one socket, with advice; "" if it can have more.
Alone = Callable[[Listen, str], str]
_HINTS = {
    errno.EACCES: "a port this low needs root or CAP_NET_BIND_SERVICE: start as root with "
    "--user, or choose another port",
    errno.EADDRNOTAVAIL: "no interface has this address: add ?freebind=1 to bind it anyway",
}


@frozen
class Bound:
    """A listening socket with its settings."""

    socket: socket.socket
    settings: ListenerSettings
    inherited: bool = False  # from the previous protector; the service manager kept the socket

    def discard(self) -> None:
        """Close the socket, and remove the socket files that the bind has made."""
        if not self.inherited:
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
    inherited: Mapping[str, Bound] | None = None,
    have: Collection[str] = (),
    released: Collection[str] = (),
    earlier: Mapping[str, Listen] | None = None,
    alone: Alone | None = None,
    dry: bool = False,
) -> list[Bound]:
    """Bind every address, in order, and listen.  If this raises Refusal, no socket stays open.

    The caller owns the returned sockets.

    notice: called with lines for the operator.
    passed: sockets from the service manager, by the index of the argument that uses them.
    inherited: sockets from the previous protector, by place() (stored_listeners.py).
    have: canonical addresses that are bound already, and are skipped.
    released: for a dry run: addresses that will be free when the running protector ends.
    earlier: the arguments that were bound before these, by the place() of each address.
    alone: for workers that accept; see pair().
    dry: only check that the bind would work; close the returned sockets, except passed sockets.
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
                found = _bind(listen, addresses, own, inherited or {}, released, alone)
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
    """Prepare sockets for workers that accept; return each possible second socket, by index.

    The caller owns the second sockets.  This function may set `beside` in a second socket's
    settings; then these settings hold for the first socket, too.
    See reuseport.py for TCP, and socket_file.py for UNIX sockets.

    listens: the arguments of these sockets.
    notice: called with a line for each address that cannot have a second socket.
    alone: returns why a path can have only one socket.

    Workers share the flag O_NONBLOCK through the open file description, so the option `nonblock`
    decides the flag.  A passed socket keeps its flag.
    """
    found = {}
    by_text = {each.text: each for each in listens}
    for index, each in enumerate(bound):
        foreign = each.settings.foreign
        try:
            if not foreign:
                each.socket.setblocking(not each.settings.nonblock)
            elif why := _why_not_shared(each.socket, bound):
                notice(_alone(each, why))
                # An earlier protector may have made a group (reuseport.py) of this socket.
                reuseport.steer_if_can(each.socket)
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
        found[index] = Bound(sibling, each.settings)
    return found


def reserve(bound: Iterable[Bound]) -> dict[int, Bound]:
    """Bind sockets that serve no client, for a hold and probes; return them by index.

    The caller owns the sockets.  A failure is ignored here: a later hold reports it.  The sockets
    are bound now, because the process may later run as another user.  That user could not bind a
    port below 1024, or share an address with this user's sockets (SO_REUSEPORT in socket(7)).
    """
    found = {}
    for index, each in enumerate(bound):
        if each.settings.foreign or each.socket.family == socket.AF_UNIX:
            continue
        with suppress(OSError):
            third = reuseport.reserve(each.socket, each.socket.getsockname())
            found[index] = Bound(third, each.settings)
    return found


def _alone(bound: Bound, why: str) -> str:
    """Return the notice for an address that has only one socket."""
    return (
        f"{bound.settings.address}: no second socket ({why}). Servers that close "
        "accepted-but-unread connections may drop a few at each reload"
    )


def _why_not_shared(given: socket.socket, bound: Sequence[Bound]) -> str:
    """Return why a passed socket cannot share its address with a second socket; "" if it can.

    Every listening socket of the same address must be in `bound`: a socket that an earlier
    protector has left behind would shift the positions in the group (reuseport.py).
    """
    if given.family not in _IP:
        return ""
    if not given.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        return "it was passed in without ReusePort=yes"
    if is_elsewhere(given):
        return "it was opened in another network namespace"
    known = {os.fstat(each.socket.fileno()).st_ino for each in bound}
    like = (os.fstat(given.fileno()).st_ino,)
    if not listening(given.family, given.getsockname()[1], like).keys() <= known:
        return "another program listens at that address"
    return ""


def could_pair(bound: Sequence[Bound]) -> set[int]:
    """Return the indexes of the sockets for which pair() would probably bind a second socket.

    This estimate is for --check, which binds nothing.
    """
    return {
        index
        for index, each in enumerate(bound)
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
    # For a str, Python would load the IDNA codec, which takes memory.  ASCII names do not need it.
    name = host.encode() if host.isascii() else host
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "no valid name"
        hint = "check the name, or write the address as a number"
        if "%" in host:
            hint = "see `ip link` for the interfaces there are"
        raise SystemRefused(f"cannot resolve {host} in {listen.text}: {reason}; {hint}") from error
    return list(dict.fromkeys((each[0], scoped.host_of(each[4])) for each in answers))


def _has_ipv6() -> bool:
    """Return True if an IPv6 socket can be bound.  The kernel may lack IPv6, or disable it."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        return error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
    return True


def addresses_of(listen: Listen, notice: Callable[[str], None]) -> list[str]:
    """Return the canonical addresses of an argument; a port that the kernel will choose is 0."""
    return [canonical(family, host, listen.port) for family, host in _addresses(listen, notice)]


def canonical(family: int, host: str, port: int = 0) -> str:
    """Return an address in its canonical form, such as `tcp:[::]:80` or `unix:/run/x`."""
    if family == socket.AF_UNIX:
        return f"unix:{host}"
    return f"tcp:[{host}]:{port}" if family == socket.AF_INET6 else f"tcp:{host}:{port}"


def _bind(
    listen: Listen,
    addresses: Sequence[_Address],
    backlog: int | None,
    inherited: Mapping[str, Bound],
    released: Collection[str],
    alone: Alone | None,
) -> list[Bound]:
    """Bind the addresses of one argument to the same port.  backlog None: only check."""
    for tries_left in reversed(range(_SAME_PORT_TRIES)):
        bound: list[Bound] = []
        port = listen.port
        try:
            for family, host in addresses:
                address = canonical(family, host, port)
                here = place(address) if released else address
                if family == socket.AF_INET6:
                    # `released` is from /proc, which names no interface.
                    here = scoped.without_interface(here)
                # /proc does not show whether another [::] takes IPv4 clients, too.
                dual = family != socket.AF_INET6 or _takes_ipv4(address, listen)
                free = not any(_overlap(here, other, dual=dual) for other in released)
                each = inherited.get(place(address)) or _bind_one(
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
    """Return a canonical address; for a UNIX path, with symbolic links in its folder resolved."""
    path = address.removeprefix("unix:")
    if path == address or path.startswith("@"):
        return address
    folder, name = os.path.split(path)
    return f"unix:{os.path.join(os.path.realpath(folder), name)}"


def refuse_twice(address: str, listen: Listen, earlier: Mapping[str, Listen]) -> None:
    """Raise UsageError if the address overlaps the address of an earlier argument.

    Without this check, the bind would report our own process as the owner of the address, and a dry
    run would not notice the overlap.

    earlier: arguments by place().  place() is slow, so it is called once for each address.
    """
    here = place(address)
    for other_place in earlier.keys() & {here} if here.startswith("unix:") else earlier:
        other = earlier[other_place]
        if {*listen.options, *other.options} & {"device"}:
            continue
        dual = _takes_ipv4(here, listen) or _takes_ipv4(other_place, other)
        if _overlap(here, other_place, dual=dual):
            why = f"both are {here}" if here == other_place else f"{here} and {other_place} overlap"
            raise UsageError(
                f"cannot listen on {listen.text} beside {other.text}: {why}; leave one of them out"
            )


def _takes_ipv4(address: str, listen: Listen) -> bool:
    return address.startswith("tcp:[::]:") and listen.options.get("v6only") == "0"


def _overlap(first: str, second: str, *, dual: bool) -> bool:
    """Return True if two addresses, in the form of place(), overlap.

    dual: whether [::] takes IPv4 clients, too.
    """
    if first == second or "unix:" in (first[:5], second[:5]):
        return first == second
    (host, _, port), (host_2, _, port_2) = first.rpartition(":"), second.rpartition(":")
    same_family = host.startswith("tcp:[") == host_2.startswith("tcp:[")
    wild = {"tcp:[::]", "tcp:0.0.0.0"} if same_family else {"tcp:[::]"} if dual else set()
    return port == port_2 and not wild.isdisjoint((host, host_2))


def reuse(bound: Bound, listen: Listen, backlog: int) -> Bound:
    """Set up an inherited listening socket like a newly bound socket.

    Raises Refusal, or an OSError that names the option that cannot be set.
    """
    sock = bound.socket
    sock.setblocking(False)
    if listen.path is not None:
        socket_copy.reapply_options(sock, sock)
        return replace(bound, settings=reapply_options(sock, listen, listen.path, backlog))
    interface = bound.settings.address.partition("%")[2].rpartition("]")[0]
    with _unbound(listen, socket.AddressFamily(sock.family)) as fresh:
        socket_copy.reapply_options(sock, fresh, device=not interface)
    # Do this only if the socket lacks its interface: before Linux 5.7 the call needs CAP_NET_RAW.
    if interface and sock.getsockname()[3] != socket.if_nametoindex(interface):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
    sock.listen(backlog)
    return bound


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
    sock = _unbound(listen, family)
    with on_error(sock.close):
        if not free:
            pass  # only the options are checked, because the port is not free yet
        elif port or backlog is None:
            sock.bind(scoped.sockaddr(host, port))
        else:
            # Find a free port first, then bind to its number.  A socket that was bound to port 0
            # would get another port when it listens again after a worker has shut it down
            # (SOCK_BINDPORT_LOCK, tcp_set_state() in net/ipv4/tcp.c).
            # Both sockets can have the port, because neither of them listens.
            with _unbound(listen, family) as chooser:
                chooser.bind(scoped.sockaddr(host, 0))
                port = chooser.getsockname()[1]
                sock.bind(scoped.sockaddr(host, port))
        if backlog is not None:
            reuseport.prepare(sock)
            sock.listen(backlog)
    return Bound(sock, ListenerSettings(canonical(family, host, port)))


def _unbound(listen: Listen, family: socket.AddressFamily) -> socket.socket:
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
    elif error.errno == errno.EINVAL and host.startswith("fe80:"):
        hint = "a link-local address needs its interface, as in [fe80::1%eth0]:80"
    elif error.errno == errno.EINVAL and host.startswith("::ffff:"):
        hint = "write the IPv4 address as such, or add ?v6only=0"
    else:
        hint = _HINTS.get(error.errno or 0, "check the address and its options")
    return SystemRefused(f"{what}; {hint}")
