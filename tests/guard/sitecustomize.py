"""With this folder on PYTHONPATH, every Python process refuses to connect to anything but its own machine.

Python imports `sitecustomize` at start-up, so notebook kernels are guarded like the test session that starts them.
"""

import importlib.machinery
import importlib.util
import ipaddress
import os
import socket
import sys
from typing import Any


class NetworkBlocked(OSError):
    """A connection or a look-up that would have left this machine."""


def _is_local(host: Any) -> bool:
    name = host.decode("idna", "replace") if isinstance(host, bytes | bytearray) else host
    if name is None or name in ("", "localhost", "ip6-localhost"):
        return True
    try:
        address = ipaddress.ip_address(str(name).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _guard(event: str, args: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        connection, address = args
        if address is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
            return  # connected before, and looked at then; or a socket that cannot leave the machine
        host, asked = address[0], f"{address[0]}:{address[1]}"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = asked = args[0]
    else:
        return
    if not _is_local(host):
        raise NetworkBlocked(f"the course runs without a network; {asked} was asked for")


sys.addaudithook(_guard)

if __name__ == "sitecustomize":  # let the sitecustomize that this one hides run too
    _here = os.path.dirname(os.path.abspath(__file__))
    _spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p) != _here])
    if _spec and _spec.loader:
        _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
