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


@pytest.mark.parametrize(("on_cuda", "way", "refused"), [(True, "distributed", True), (True, "tensor", False),
                                                         (False, "distributed", False)])  # fmt: skip
def test_no_nccl_group_with_servers_on_the_trainers_gpus(on_cuda: bool, way: str, refused: bool) -> None:
    key = "actor_rollout_ref.rollout"
    config = load(
        Config, None, [f"{key}.name=sglang", f"{key}.sglang.colocated=true", f"{key}.sglang.weights.way={way}"]
    )
    parallel: Any = SimpleNamespace(platform=SimpleNamespace(is_cuda=on_cuda))
    shape: Any = SimpleNamespace(max_position_embeddings=512)
    if refused:
        with pytest.raises(ValueError, match="way=distributed .* no two members on one GPU.* way=tensor"):
            server_spec(config, parallel, shape, 256)
    else:
        assert server_spec(config, parallel, shape, 256).on_cpu is not on_cuda
