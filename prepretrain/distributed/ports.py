"""Where the processes of a run meet: a port below those that Linux gives to connections (32768 and up),
which may hold one for a minute after their end."""

import secrets
import socket
import zlib

_PORTS = range(20000, 32000)


def named(name: str) -> int:
    """The port of processes that know nothing of each other but a name."""
    return _PORTS[zlib.crc32(name.encode()) % len(_PORTS)]


def free() -> int:
    """A port that no program on this machine holds."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as tried:
            try:
                tried.bind(("", port))
            except OSError:
                continue
        return port
