"""Gradients of every layout against transformers' autograd, under their Hugging Face names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from harness import run_ranks
from pipeline import run_pipeline
from tiny import make_tiny_hf

from spear_megatron.model.hf_io import iter_hf_tensors, load_hf_folder
from spear_megatron.model.provider import build_model
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.parallel.state import initialize

LENGTHS = (6, 13, 5)
NUM_BATCHES = 2


class Layout(NamedTuple):
    world: int
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sp: bool = False
    distributed_optimizer: bool = True
    recompute: str | None = None


LAYOUTS = {
    "one": Layout(1),
    "dp2": Layout(2),
    "dp2-plain-optimizer": Layout(2, distributed_optimizer=False),
    "tp2-sp": Layout(2, tp=2, sp=True),
    "pp2": Layout(2, pp=2),
    "pp2-vpp2-full-recompute": Layout(2, pp=2, vpp=2, recompute="full"),
    "tp2-selective-recompute": Layout(2, tp=2, recompute="selective"),
}
SLOW_LAYOUTS = {
    "tp2-pp2": Layout(4, tp=2, pp=2),
    "tp4-more-ranks-than-kv-heads": Layout(4, tp=4),
    "tp2-sp-dp2": Layout(4, tp=2, sp=True),
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied": ("qwen2", {}),
    "qwen3-untied": ("qwen3", {"tie_word_embeddings": False, "vocab_size": 77, "head_dim": 16}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_tiny_hf(root / name, arch, **fields) for name, (arch, fields) in SHAPES.items()}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: _reference_gradients(folder) for name, folder in models.items()}


def _batch(number: int, vocab_size: int) -> SimpleNamespace:
    """Packed micro-batch with the weights [T, vocab] of its linear loss."""
    generator = torch.Generator().manual_seed(number)
    return SimpleNamespace(
        tokens=torch.randint(0, vocab_size, (sum(LENGTHS),), generator=generator),
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS]),
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32),
        weights=torch.randn(sum(LENGTHS), vocab_size, generator=generator),
    )


def _reference_gradients(folder: Path) -> dict[str, torch.Tensor]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number in range(NUM_BATCHES):
        batch = _batch(number, model.config.vocab_size)
        for row, weight in zip(batch.tokens.split(LENGTHS), batch.weights.split(LENGTHS)):
            (model(row[None]).logits[0] * weight).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _gradients(folders: dict[str, Path], layout: Layout) -> dict[str, dict[str, torch.Tensor]]:
    parallel = initialize(tp=layout.tp, pp=layout.pp, vpp=layout.vpp, timeout_s=60)
    full = layout.recompute == "full"
    megatron = MegatronConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        sequence_parallel=layout.sp,
        use_distributed_optimizer=layout.distributed_optimizer,
        recompute_granularity=layout.recompute,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
    )
    result = {}
    for name, folder in folders.items():
        shape = ModelShape.from_folder(folder)
        chunks = build_model(shape, megatron, dtype=torch.float32, parallel=parallel)
        load_hf_folder(chunks, shape, folder, parallel)
        _accumulate(chunks, shape, parallel)
        named = iter_hf_tensors(chunks, shape, parallel, kind="main_grad")
        gradients = {hf_name: tensor for hf_name, tensor in named if tensor is not None}
        if parallel.is_leader:
            result[name] = gradients
    return result


def _accumulate(chunks: list, shape: ModelShape, parallel: Any) -> None:
    def loss(logits: torch.Tensor, batch: SimpleNamespace) -> torch.Tensor:
        part = logits.shape[-1]
        padded = torch.nn.functional.pad(batch.weights, (0, part * parallel.tp_size - shape.vocab_size))
        own = padded[:, parallel.tp_rank * part : (parallel.tp_rank + 1) * part]
        return (logits[0] * own).sum()

    for chunk in chunks:
        chunk.zero_grad_buffer()
    numbers = range(parallel.dp_rank, NUM_BATCHES, parallel.dp_size)
    run_pipeline(chunks, [_batch(number, shape.vocab_size) for number in numbers], loss, backward=True)


def _check(layout: Layout, models: dict[str, Path], references: dict[str, dict[str, torch.Tensor]]) -> None:
    results = [result for result in run_ranks(_gradients, layout.world, models, layout) if result]
    assert len(results) == layout.world // (layout.tp * layout.pp)
    for name, reference in references.items():
        for result in results:
            assert result[name].keys() == reference.keys()
            for hf_name, expected in reference.items():
                error = (result[name][hf_name] - expected).norm() / expected.norm()
                assert error < 1e-5, (name, hf_name, float(error))


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_transformers(
    name: str, models: dict[str, Path], references: dict[str, dict[str, torch.Tensor]]
) -> None:
    _check(LAYOUTS[name], models, references)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_LAYOUTS)
def test_gradients_of_more_layouts(
    name: str, models: dict[str, Path], references: dict[str, dict[str, torch.Tensor]]
) -> None:
    _check(SLOW_LAYOUTS[name], models, references)
