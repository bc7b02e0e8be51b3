"""What only GPUs meet on the way of weights to servers: NCCL groups that break, and members on one GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from spear_megatron.cli.servers import server_spec
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.weights.servers import ServerGroup, Target
from spear_megatron.weights.ways.broadcast_group import BroadcastGroup


@pytest.mark.parametrize(
    ("backend", "broken", "expected"),
    [("nccl", True, "abort"), ("nccl", False, "destroy"), ("gloo", True, "destroy"), ("gloo", False, "destroy")],
)
def test_a_broken_nccl_group_is_aborted_instead_of_waited_for(
    backend: str, broken: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[tuple[str, object]] = []
    monkeypatch.setattr(c10d, "_abort_process_group", lambda group: left.append(("abort", group)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: left.append(("destroy", group)))
    told: list[str] = []

    class Client:
        def destroy_group(self, name: str) -> None:
            told.append(name)

    group = BroadcastGroup.__new__(BroadcastGroup)
    group.targets, group.name, group._backend = (Target("http://a", 1, "0"),), "g", backend
    group._servers = ServerGroup(timeout_s=5.0, connect=lambda url: Client())  # type: ignore[arg-type,return-value]
    group._group, group._store = object(), None  # type: ignore[assignment]
    group.close(broken=broken)
    assert left == [(expected, group._group)] and told == ["g"]


IPC = ("sglang.weights.transport=cuda_ipc", "sglang.colocated=true")
ONE_MACHINE = {"is_cuda": True, "world_size": 8, "dp_size": 4, "tp_size": 2}


@pytest.mark.parametrize(
    ("place", "options", "refused"),
    [
        (ONE_MACHINE, ("sglang.colocated=true", "sglang.weights.way=distributed"), "no two members on one GPU"),
        (ONE_MACHINE, ("sglang.weights.way=distributed",), ""),
        (ONE_MACHINE, ("sglang.colocated=true", "sglang.weights.way=tensor"), ""),
        (ONE_MACHINE | {"is_cuda": False}, ("sglang.colocated=true", "sglang.weights.way=distributed"), ""),
        (ONE_MACHINE, (*IPC, "sglang.launch.tp_size=8"), ""),
        (ONE_MACHINE, (*IPC, "sglang.launch.tp_size=7"), ""),  # the last leader is on GPU 6
        (ONE_MACHINE, (*IPC, "sglang.launch.tp_size=6"), "takes in GPU 6"),
        (ONE_MACHINE, (*IPC, "sglang.launch.tp_size=8", "sglang.launch.num_servers=2"), "no GPUs but its own"),
        (ONE_MACHINE, (IPC[0], "sglang.launch.tp_size=8"), "colocated=true with one server"),
        (ONE_MACHINE | {"world_size": 16}, (*IPC, "sglang.launch.tp_size=8"), "on one machine"),
    ],
)
def test_ways_of_weights_that_cannot_work_are_refused(
    place: dict[str, Any], options: tuple[str, ...], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    key = "actor_rollout_ref.rollout"
    config = load(Config, None, [f"{key}.name=sglang", *(f"{key}.{option}" for option in options)])
    platform = SimpleNamespace(is_cuda=place["is_cuda"])
    parallel: Any = SimpleNamespace(platform=platform, cp_size=1, **{k: v for k, v in place.items() if k != "is_cuda"})
    shape: Any = SimpleNamespace(max_position_embeddings=512)
    if refused:
        with pytest.raises(ValueError, match=refused):
            server_spec(config, parallel, shape, 256)
    else:
        assert server_spec(config, parallel, shape, 256).on_cpu is not place["is_cuda"]
