"""Ports of servers, chosen where nothing else on the machine is given one by chance."""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from spear_megatron.rollout.engine import EngineError

# SGLang 0.5.15 derives a second port from a server's, this far above, and refuses to start without it.
_DERIVED = 10_000
_TRIES = 20
_LOWEST = 20_000  # Ray's workers take 10002 to 19999 (its --min-worker-port and --max-worker-port)
_HIGHEST = 65_535
_FEWEST = 1_000  # a range with fewer ports than these is too crowded to draw from
_KERNEL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(host: str, kernel_range: Path = _KERNEL_RANGE) -> int:
    """A port of ``host`` that was free a moment ago, with room for the one that SGLang derives from it.

    A server listens seconds after it was given its ports. Meanwhile the kernel may hand any port of its own range
    (``net.ipv4.ip_local_port_range``) to an outgoing connection, so that both are drawn below that range; where it
    leaves no room, or is not known, the kernel chooses.

    Args:
        kernel_range: file with the lowest and the highest port that the kernel hands out.
    """
    try:
        below = int(kernel_range.read_text().split()[0]) - _DERIVED
    except (OSError, ValueError, IndexError):
        below = 0
    draw = random.SystemRandom()
    for _ in range(_TRIES):
        if below - _LOWEST >= _FEWEST:
            port = draw.randrange(_LOWEST, below)
        else:
            with _socket(host) as probe:
                probe.bind((host, 0))
                port = int(probe.getsockname()[1])
        if port + _DERIVED <= _HIGHEST and is_free(host, port) and is_free(host, port + _DERIVED):
            break
    return port


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on ``port`` now."""
    with _socket(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


class Ports:
    """Hands out ports of one host, none of them twice: a server listens long after it was given its port.

    Args:
        candidate: proposes a port of the host.
    """

    def __init__(self, host: str, candidate: Callable[[str], int] = free_port) -> None:
        self._host = host
        self._everywhere = "::" if ":" in host else "0.0.0.0"
        self._candidate = candidate
        self._given: set[int] = set()
        self._lock = threading.Lock()

    def choose(self) -> int:
        """The first proposed port that is free on every address of this machine (where SGLang's rendezvous listens).

        Raises:
            EngineError: every one was taken.
        """
        with self._lock:
            for _ in range(_TRIES):
                port = self._candidate(self._host)
                if port not in self._given and is_free(self._everywhere, port):
                    self._given.add(port)
                    return port
        raise EngineError(f"no free port on {self._host} after {_TRIES} tries")


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
