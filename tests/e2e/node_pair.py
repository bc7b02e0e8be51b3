"""Two machines on one: two network namespaces of an own user namespace, joined by a pair of virtual interfaces."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERFACE = "veth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
READY_DEADLINE_S = 20.0


class NamespacesUnavailable(RuntimeError):
    """The kernel or the container refuses namespaces; the message says which step."""


@dataclass(frozen=True)
class Node:
    """One of the two: ``holder`` is the process that keeps its network namespace."""

    address: str
    holder: int

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command inside the node; ``options`` are those of ``Popen``."""
        return subprocess.Popen([*self._enter(), *command], text=True, **options)

    def call(self, *command: str) -> None:
        """Run a short command inside the node.

        Raises:
            NamespacesUnavailable: it failed.
        """
        _checked([*self._enter(), *command])

    def cut(self) -> None:
        """Take the interface down: nothing arrives any more, no connection is closed."""
        self.call("ip", "link", "set", INTERFACE, "down")

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self.holder}", "--user", "--net", "--preserve-credentials", "--"]


@contextlib.contextmanager
def node_pair() -> Iterator[tuple[Node, Node]]:
    """Two nodes that reach each other at ``ADDRESSES`` over ``INTERFACE``, and nothing else. Needs no root.

    Raises:
        NamespacesUnavailable: a program is missing, or the kernel forbids it.
    """
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if missing:
        raise NamespacesUnavailable(f"not installed: {', '.join(missing)}")
    with contextlib.ExitStack() as stack:
        first = Node(ADDRESSES[0], _hold(stack, ["unshare", "--user", "--map-root-user", "--net"], 0))
        # The second network belongs to the same user namespace, so that one interface may be moved into it.
        inside = ["nsenter", f"--target={first.holder}", "--user", "--preserve-credentials", "--", "unshare", "--net"]
        second = Node(ADDRESSES[1], _hold(stack, inside, first.holder))
        first.call(
            "ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", str(second.holder)
        )
        for node in (first, second):
            node.call("ip", "address", "add", f"{node.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                node.call("ip", "link", "set", interface, "up")
        yield first, second


def _hold(stack: contextlib.ExitStack, command: Sequence[str], older: int) -> int:
    """Start a process that does nothing in new namespaces, and wait until it is there."""
    process = subprocess.Popen([*command, "sleep", "3600"], stderr=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    outside = {_network("self"), _network(str(older)) if older else ""}
    deadline = time.monotonic() + READY_DEADLINE_S
    while _network(str(process.pid)) in outside:
        if process.poll() is not None:
            assert process.stderr is not None
            raise NamespacesUnavailable(f"{' '.join(command)}: {process.stderr.read().strip()}")
        if time.monotonic() > deadline:
            raise NamespacesUnavailable(f"{' '.join(command)} made no namespace in {READY_DEADLINE_S:.0f} s")
        time.sleep(0.02)
    return process.pid


def _network(pid: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""


def _checked(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=READY_DEADLINE_S, check=False)
    if done.returncode:
        raise NamespacesUnavailable(f"{' '.join(command)}: {done.stderr.strip()}")
