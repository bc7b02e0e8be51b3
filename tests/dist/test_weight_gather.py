"""Buckets gathered from every layout against the exported file: the same bytes, within the memory limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from safetensors.torch import load_file
from tiny import make_tiny_hf

LAYOUTS = {
    "1 rank": (1, 1, 1, None, {}),
    "TP2 x PP2": (4, 2, 2, None, {}),
    "PP2, VPP2": (2, 1, 2, 2, {"num_layers": 8}),
    "DP2": (2, 1, 1, None, {}),
    "TP2, few groups": (2, 2, 1, None, {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "CP2 x PP2": (4, 1, 2, None, {"cp": 2}),
    "TP2 x DP2": (4, 2, 1, None, {"tie_word_embeddings": False}),
}


def gather_on_rank(folder: str, out: str, layout: Any, dtype: torch.dtype, limit: int) -> dict[str, Any]:
    """What this rank's sender received, its peak, and the limit; the export is written beside."""
    from spear_megatron.model.hf_export import export_hf
    from spear_megatron.model.hf_io import load_hf_folder
    from spear_megatron.model.provider import build_model
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.parallel.config import MegatronConfig
    from spear_megatron.parallel.state import initialize
    from spear_megatron.weights.gather import BucketGatherer
    from spear_megatron.weights.memory import BufferPool, Ledger, host_bytes
    from spear_megatron.weights.plan import plan_sync
    from spear_megatron.weights.stream import stream_buckets

    _, tp, pp, vpp, options = layout
    cp = options.get("cp", 1)
    parallel = initialize(tp=tp, pp=pp, vpp=vpp, cp=cp, timeout_s=60)
    shape = ModelShape.from_folder(folder)
    megatron = MegatronConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
    )
    chunks = build_model(shape, megatron, dtype=dtype, parallel=parallel)
    load_hf_folder(chunks, shape, folder, parallel)
    export_hf(chunks, shape, parallel, out, folder)
    plan = plan_sync(shape.parameter_shapes(), dtype, limit_bytes=limit, num_owners=parallel.dp_size)
    ledger = Ledger()
    pool = BufferPool(limit, ledger, host_bytes)
    gatherer = BucketGatherer(chunks, shape, parallel, plan, pool, ledger)
    received: dict[str, torch.Tensor] = {}

    def record(bucket: Any, flat: torch.Tensor) -> None:
        received.update({entry.name: entry.view(flat, dtype).clone() for entry in bucket.entries})

    own = plan.owned_by(parallel.dp_rank)
    for buckets in (own, (plan.closing,) if parallel.dp_rank == 0 else ()):
        stream_buckets(gatherer, buckets, pool, record)
    assert ledger.alive == 0
    largest = max((entry.num_bytes for bucket in plan.buckets for entry in bucket.entries))
    return {"tensors": received, "peak": ledger.peak, "largest": largest, "oversized": plan.oversized}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gathered_bytes_are_the_exports_and_memory_is_bounded(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    dtype = torch.bfloat16 if name == "TP2 x PP2" else torch.float32
    folder = make_tiny_hf(tmp_path / "model", **{key: value for key, value in layout[-1].items() if key != "cp"})
    limit = 8192  # the embedding is larger in float32
    results = run_ranks(gather_on_rank, layout[0], str(folder), str(tmp_path / "out"), layout, dtype, limit)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    received: dict[str, torch.Tensor] = {}
    for result in results:
        assert not received.keys() & result["tensors"].keys()
        received |= result["tensors"]
        assert result["peak"] <= 3 * limit + result["largest"]
        assert bool(result["oversized"]) == (dtype == torch.float32)
    assert received.keys() == expected.keys()
    for key, tensor in expected.items():
        assert received[key].dtype == tensor.dtype and torch.equal(received[key], tensor), key
    senders = [rank for rank, result in enumerate(results) if result["tensors"]]
    assert len(senders) == (2 if "DP2" in name else 1)
