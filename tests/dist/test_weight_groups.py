"""Broadcast groups with servers: joining, refusals, absentees, and the turns that leaders take."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from spear_megatron.rollout.engine import EngineError
from spear_megatron.weights.plan import plan_sync
from spear_megatron.weights.servers import COLLATERAL, ServerGroup, Target
from spear_megatron.weights.ways.broadcast_group import BroadcastGroup, JoinError, own_address
from spear_megatron.weights.ways.distributed import DistributedWay, Turns


class Joining:
    """A server that joins a group as rank 1 of it would, refuses, or does not come."""

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour
        self.left: list[str] = []

    def init_group(self, *, port: int, name: str, rank_offset: int, timeout_s: float, **_: Any) -> None:
        if self.behaviour == "refuses":
            raise EngineError("HTTP 400: the group name is taken")
        store = dist.TCPStore("127.0.0.1", port)
        if self.behaviour == "joins":
            store.set(f"{name}/{name}//cpu//0/{rank_offset}", "address")  # as gloo announces itself
        try:
            store.wait(["what never comes"])
        except RuntimeError as error:
            raise EngineError(f"HTTP 400: {str(error)[:40]}") from error

    def destroy_group(self, name: str) -> None:
        self.left.append(name)


def _form(behaviours: dict[str, str], timeout_s: float) -> tuple[dict[str, str], float]:
    """Why a group did not come about, and after how many seconds."""
    servers: Any = {url: Joining(behaviour) for url, behaviour in behaviours.items()}
    group = ServerGroup(timeout_s=timeout_s, connect=servers.__getitem__)
    targets = [Target(url, 1) for url in behaviours]
    start = time.monotonic()
    with pytest.raises(JoinError) as error:
        BroadcastGroup(group, targets, name="g", address=None, backend="gloo", timeout_s=timeout_s)
    return error.value.reasons, time.monotonic() - start


def test_a_server_that_does_not_come_is_named_and_those_that_wait_are_released() -> None:
    reasons, seconds = _form({"http://localhost:1": "joins", "http://localhost:2": "stays away"}, 1.0)
    assert list(reasons) == ["http://localhost:2"]
    assert "did not join the group g within 1 s" in reasons["http://localhost:2"]
    assert seconds < 10.0  # the one that joined waits for ever unless the store goes away


def test_a_refusal_ends_the_wait_at_once() -> None:
    reasons, seconds = _form({"http://localhost:1": "joins", "http://localhost:2": "refuses"}, 60.0)
    assert reasons == {"http://localhost:2": "HTTP 400: the group name is taken"} and seconds < 20.0


def test_only_the_guilty_server_is_blamed() -> None:
    servers: Any = {"http://localhost:1": Joining("joins"), "http://localhost:2": Joining("refuses")}
    group = ServerGroup(timeout_s=5.0, connect=servers.__getitem__)
    way = DistributedWay(
        group, torch.float32, torch.device("cpu"), leader=0, address=None, run_name="r", turns=None
    )
    way.begin([Target(url, 1) for url in servers], 1)
    assert group.failures["http://localhost:1"] == COLLATERAL and "taken" in group.failures["http://localhost:2"]
    (bucket,) = plan_sync({"a": (2,)}, torch.float32, limit_bytes=100, num_owners=1).buckets
    way.send(bucket, torch.zeros(8, dtype=torch.uint8))  # nobody is left to receive, and nobody is waited for
    way.close()


def test_loopback_is_given_only_to_servers_of_this_host() -> None:
    assert own_address(["http://127.0.0.1:3", "http://localhost:4"]) == "127.0.0.1"
    assert own_address(["http://127.0.0.1:3", "http://10.0.0.7:4"]) != "127.0.0.1"


def test_turns_come_in_order_and_a_late_one_is_named() -> None:
    store, order = dist.HashStore(), []

    def take(positions: list[int]) -> None:
        turns = Turns(store, "key", 10.0)
        for position in positions:
            turns.wait(position)
            order.append(position)
            turns.passed()

    threads = [threading.Thread(target=take, args=(positions,)) for positions in ([1, 2, 5], [0, 3, 4])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4, 5]
    with pytest.raises(EngineError, match="bucket 7 waited 0.05 s for its turn, bucket 6 is late"):
        Turns(store, "key", 0.05).wait(7)


def _broadcast(num_steps: int) -> list[list[float]]:
    """Rank 0 leads a real gloo group whose other rank plays a server; what arrived there."""
    from spear_megatron.parallel.state import initialize

    parallel = initialize(timeout_s=30)
    plan = plan_sync({"a": (3,), "b": (2,)}, torch.float32, limit_bytes=12, num_owners=1)
    if parallel.rank == 0:
        return _lead(parallel, plan, num_steps)
    return _follow(parallel, plan, num_steps)


def _lead(parallel: Any, plan: Any, num_steps: int) -> list[list[float]]:
    class Remote:
        def init_group(self, **place: Any) -> None:
            parallel.store.set("place", f"{place['port']} {place['name']} {place['world_size']}")

        def update_from_group(self, tensors: Any, **_: Any) -> None:
            assert [dtype for _, dtype, _ in tensors] == ["float32"] * len(tensors)

        def destroy_group(self, name: str) -> None:
            pass

    group = ServerGroup(timeout_s=20.0, connect=lambda url: Remote())  # type: ignore[arg-type, return-value]
    way = DistributedWay(group, torch.float32, torch.device("cpu"), leader=0, address=None, run_name="r", turns=None)
    for step in range(num_steps):
        way.begin([Target("http://localhost:1", 1)], step)
        for bucket in plan.buckets:
            send = way.send_closing if bucket is plan.closing else way.send
            flat = torch.full((bucket.num_bytes // 4,), float(10 * step + bucket.index))
            send(bucket, flat.view(torch.uint8))
    way.close()
    assert not group.failures
    return []


def _follow(parallel: Any, plan: Any, num_steps: int) -> list[list[float]]:
    from datetime import timedelta

    from torch.distributed import distributed_c10d as c10d

    port, name, size = parallel.store.get("place").decode().split()
    store = dist.PrefixStore(name, dist.TCPStore("127.0.0.1", int(port)))
    group, _ = c10d._new_process_group_helper(
        int(size), 1, [], dist.Backend("gloo"), store, group_name=name, timeout=timedelta(seconds=20)
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(int(size))}
    received = []
    for _ in range(num_steps):
        for bucket in plan.buckets:
            flat = torch.empty(bucket.num_bytes, dtype=torch.uint8)
            group.broadcast(flat, 0).wait()
            received.append(flat.view(torch.float32).tolist())
    dist.destroy_process_group(group)
    return received


def test_a_group_is_formed_once_and_carries_every_bucket() -> None:
    _, received = run_ranks(_broadcast, 2, 2)
    assert received == [[0.0] * 3, [1.0] * 2, [10.0] * 3, [11.0] * 2]
