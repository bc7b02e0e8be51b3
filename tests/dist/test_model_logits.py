"""Loaded models against transformers, over shapes and layouts: logits, and the bit-exact way back out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from pipeline import run_pipeline
from safetensors.torch import load_file
from tiny import make_tiny_hf

from spear_megatron.model.hf_export import export_hf
from spear_megatron.model.hf_io import iter_hf_tensors, load_hf_folder
from spear_megatron.model.provider import build_model
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.parallel.state import initialize

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied-2kv": ("qwen2", {}),
    "qwen2-untied-odd-vocab-1kv": ("qwen2", {"tie_word_embeddings": False, "vocab_size": 77, "num_key_value_heads": 1}),
    "qwen3-untied-wide-heads": ("qwen3", {"tie_word_embeddings": False, "head_dim": 16, "rope_theta": 1e6}),
    "qwen3-tied-many-kv": ("qwen3", {"num_key_value_heads": 4, "vocab_size": 128}),
}
LENGTHS = (5, 17, 1, 9)


class Layout(NamedTuple):
    world: int
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sp: bool = False


LAYOUTS = {
    "one": Layout(1),
    "tp2": Layout(2, tp=2),
    "tp2-sp": Layout(2, tp=2, sp=True),
    "pp2": Layout(2, pp=2),
    "pp2-vpp2": Layout(2, pp=2, vpp=2),
    "tp2-pp2": Layout(4, tp=2, pp=2),
}
SLOW_LAYOUTS = {
    "tp2-pp2-vpp2-sp": Layout(4, tp=2, pp=2, vpp=2, sp=True),
    "tp2-dp2": Layout(4, tp=2),
    "tp4-more-ranks-than-kv-heads": Layout(4, tp=4),
    "tp4-sp": Layout(4, tp=4, sp=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_tiny_hf(root / name, arch, **fields) for name, (arch, fields) in SHAPES.items()}


def _batches(vocab_size: int) -> list[SimpleNamespace]:
    generator = torch.Generator().manual_seed(1)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return [
        SimpleNamespace(
            tokens=torch.randint(0, vocab_size, (sum(LENGTHS),), generator=generator),
            position_ids=positions,
            cu_seqlens=offsets,
        )
        for _ in range(2)
    ]


def _reference(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """transformers' logits of every packed sequence on its own, [2, T, vocab] float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return torch.stack(
            [
                torch.cat([model(row[None]).logits[0].float() for row in batch.tokens.split(LENGTHS)])
                for batch in _batches(model.config.vocab_size)
            ]
        )


def _run(folders: dict[str, Path], layout: Layout, dtype: torch.dtype, out: Path | None) -> dict[str, torch.Tensor]:
    """On every rank: load, run, gather the logits; export and iterate when ``out`` is given."""
    parallel = initialize(tp=layout.tp, pp=layout.pp, vpp=layout.vpp, timeout_s=60)
    megatron = MegatronConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        sequence_parallel=layout.sp,
    )
    logits = {}
    for name, folder in folders.items():
        shape = ModelShape.from_folder(folder)
        chunks = build_model(shape, megatron, dtype=dtype, parallel=parallel)
        load_hf_folder(chunks, shape, folder, parallel)

        def collect(local: torch.Tensor, batch: Any, vocab: int = shape.vocab_size) -> torch.Tensor:
            parts = [torch.empty_like(local) for _ in range(layout.tp)]
            dist.all_gather(parts, local.contiguous(), group=parallel.tp_group)
            return torch.cat(parts, dim=-1)[0, :, :vocab].float()

        outputs = run_pipeline(chunks, _batches(shape.vocab_size), collect, backward=False)
        assert bool(outputs) == parallel.is_last_stage
        if outputs:
            logits[name] = torch.stack(outputs)
        if out is not None:
            _check_iteration(chunks, shape, folder, parallel)
            export_hf(chunks, shape, parallel, out / name, folder, max_shard_bytes=20_000)
    return logits


def _check_iteration(chunks: list, shape: ModelShape, folder: Path, parallel: Any) -> None:
    source = load_file(folder / "model.safetensors")
    names = []
    for name, tensor in iter_hf_tensors(chunks, shape, parallel, dtype=torch.float64):
        names.append(name)
        assert (tensor is not None) == parallel.is_leader
        if tensor is not None:
            assert torch.equal(tensor, source[name].double()), name
    assert names == list(shape.parameter_shapes())


def _check_export(source: Path, exported: Path) -> None:
    files = sorted(exported.glob("*.safetensors"))
    assert len(files) > 1 and max(file.stat().st_size for file in files) < 20_000 + 5_000
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    original = load_file(source / "model.safetensors")
    assert tensors.keys() == original.keys()
    for name, tensor in original.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    assert ModelShape.from_folder(exported) == ModelShape.from_folder(source)


def _check_layout(models: dict[str, Path], layout: Layout, out: Path) -> None:
    results = run_ranks(_run, layout.world, models, layout, torch.float32, out)
    logits = [result for result in results if result]
    assert len(logits) == layout.world // layout.pp
    for name, folder in models.items():
        reference = _reference(folder, torch.float32)
        for result in logits:
            torch.testing.assert_close(result[name], reference, atol=1e-4, rtol=0)
        _check_export(folder, out / name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_equal_transformers_and_export_is_bit_exact(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    _check_layout(models, LAYOUTS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_LAYOUTS)
def test_more_layouts(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    _check_layout(models, SLOW_LAYOUTS[name], tmp_path)


@pytest.mark.parametrize("name", ["one", "tp2-sp", "tp2-pp2"])
def test_bf16_logits_are_as_near_to_fp32_as_those_of_transformers(name: str, models: dict[str, Path]) -> None:
    """Rounding differs between two bf16 programs; both must stand equally near to the fp32 truth."""
    layout = LAYOUTS[name]
    results = [r for r in run_ranks(_run, layout.world, models, layout, torch.bfloat16, None) if r]
    for model, folder in models.items():
        truth, peer = _reference(folder, torch.float32), _reference(folder, torch.bfloat16)
        peer_error, error = (peer - truth).norm() / truth.norm(), (results[0][model] - truth).norm() / truth.norm()
        assert error < 1.5 * peer_error + 1e-3, (model, error, peer_error)
        assert error < 0.03


def test_exported_folder_loads_in_plain_transformers(models: dict[str, Path], tmp_path: Path) -> None:
    run_ranks(_run, 2, models, LAYOUTS["pp2"], torch.float32, tmp_path)
    for name, folder in models.items():
        exported, source = _reference(tmp_path / name, torch.float32), _reference(folder, torch.float32)
        torch.testing.assert_close(exported, source, atol=1e-5, rtol=0)  # equal weights at other addresses
