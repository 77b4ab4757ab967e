"""Which addresses on the network hone may call on a customer's behalf.

A customer names a URL, the server calls it: without a guard that reaches into the operator's own
network. Only addresses that are reachable from everywhere are called, whatever a name resolves to.
"""

from __future__ import annotations

import ipaddress
import socket

from data.errors import InvalidInput

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the open internet, seen through any IPv6 wrapping."""
    parsed: Address = ipaddress.ip_address(address.partition("%")[0])
    wrapped = [parsed]
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
        if parsed in NAT64:
            inner.append(ipaddress.IPv4Address(parsed.packed[-4:]))
        wrapped += [found for found in inner if found is not None]
        if parsed.ipv4_mapped is not None:
            wrapped.remove(parsed)  # what counts is the address inside
    return all(found.is_global and not found.is_multicast for found in wrapped)


def refuse_private(host: str) -> None:
    """Refuse a host that is plainly not of the open internet; names are checked when called.

    Raises:
        InvalidInput: It is a private address, or names this machine.
    """
    try:
        public = is_public(host)
    except ValueError:  # a name
        name = host.rstrip(".").lower()
        public = "." in name and not name.endswith((".localhost", ".local", ".internal"))
        public = public and not name.replace(".", "").isdigit()  # 127.1 and its like
    if not public:
        raise _private(host)


def resolve_public(host: str, port: int, *, allow_private: bool = False) -> str:
    """Look a host up and return the address to connect to.

    Raises:
        InvalidInput: One of its addresses is private, and `allow_private` is not set.
        OSError: The name cannot be looked up.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not allow_private and not all(map(is_public, addresses)):
        raise _private(host)
    return addresses[0]


def _private(host: str) -> InvalidInput:
    return InvalidInput(
        f"Invalid 'url': {host} is not on the open internet. The operator of this server can allow "
        "private addresses with `webhooks_allow_private`.",
        param="url",
    )
