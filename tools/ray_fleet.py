"""Place SGLang servers on the nodes of a Ray cluster and keep them running, until this process is ended.

    python tools/ray_fleet.py --address node-8:6379 --nodes 8 --servers-per-node 2 --tp 4

Every server is a task of a Ray actor that holds its GPUs, on port SERVER_PORT + its place on the node; a server that
ends is started again there, so that its URL stays. What it runs comes from the environment, as for server.sh: MODEL,
SERVER_PROGRAM, SERVER_PORT, SERVER_OPTIONS, SERVER_RESTARTS. Ray must be installed (pip install ray).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

JOIN_DEADLINE_S, PAUSE_S = 600.0, 10.0


class Server:
    """One server, as a Ray actor on its node."""

    def run(self, command: Sequence[str], restarts: int, pause_s: float = PAUSE_S) -> int:
        """Run the command again and again; the last exit code once ``restarts`` are used up."""
        code = 0
        for attempt in range(restarts + 1):
            if attempt:
                time.sleep(pause_s)
            environment = {**os.environ, "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}
            code = subprocess.run(list(command), env=environment, check=False).returncode
            print(f"{command[0]} ended with {code}", file=sys.stderr, flush=True)
        return code


def server_command(settings: Mapping[str, str], place: int) -> list[str]:
    """The command line of the server at ``place`` on its node."""
    return [
        *shlex.split(settings["SERVER_PROGRAM"]), "--model-path", settings["MODEL"], "--host", "0.0.0.0",
        "--port", str(int(settings["SERVER_PORT"]) + place), *shlex.split(settings.get("SERVER_OPTIONS", "")),
    ]  # fmt: skip


def join(ray: Any, nodes: int, deadline_s: float = JOIN_DEADLINE_S) -> list[str]:
    """Ray's ids of the nodes, once all have joined.

    Raises:
        TimeoutError: too few did.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        alive = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
        if len(alive) >= nodes:
            return alive[:nodes]
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{len(alive)} of {nodes} nodes joined in {deadline_s:.0f} s: read ray_*.log of the others"
            )
        time.sleep(0.5)


def start_servers(
    ray: Any, strategy: Any, nodes: Sequence[str], per_node: int, tp: int, settings: Mapping[str, str]
) -> list[Any]:
    """One actor per server, pinned to its node by ``strategy(node id)``; Ray gives it ``tp`` GPUs of its own.

    Returns:
        Ray's references to the exit codes, in order of node and place.
    """
    actor = ray.remote(Server)
    restarts = int(settings["SERVER_RESTARTS"])
    return [
        actor.options(num_gpus=tp, num_cpus=1, scheduling_strategy=strategy(node))
        .remote()
        .run.remote(server_command(settings, place), restarts)
        for node in nodes
        for place in range(per_node)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the fleet; 1 when a server has used up its restarts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="of the Ray head, HOST:PORT")
    parser.add_argument("--nodes", type=int, required=True, help="nodes to wait for")
    parser.add_argument("--servers-per-node", type=int, required=True)
    parser.add_argument("--tp", type=int, required=True, help="GPUs per server")
    args = parser.parse_args(argv)
    for name in ("nodes", "servers_per_node", "tp"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    host, _, port = args.address.rpartition(":")
    if not host or not port.isdecimal():
        parser.error(f"--address must be HOST:PORT of the Ray head, got {args.address!r}")
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError:
        print("error: the Ray fleet needs Ray: pip install ray, or use FLEET=srun", file=sys.stderr)
        return 2
    ray.init(address=args.address)
    nodes = join(ray, args.nodes)
    codes = start_servers(
        ray, lambda node: NodeAffinitySchedulingStrategy(node, soft=False), nodes, args.servers_per_node, args.tp,
        dict(os.environ),
    )  # fmt: skip
    ray.wait(codes, num_returns=1)
    print("error: a server has used up its restarts: read its output in ray_*.log", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
