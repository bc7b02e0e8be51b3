"""Loading and exporting on several ranks: refusals on all of them, shards, companions, atomic replacement."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from safetensors.torch import load_file, save_file
from tiny import make_tiny_hf

from spear_megatron.model import hf_export
from spear_megatron.model.hf_export import export_hf
from spear_megatron.model.hf_folder import INDEX_NAME, SINGLE_NAME
from spear_megatron.model.hf_io import iter_hf_tensors, load_hf_folder
from spear_megatron.model.provider import build_model, padded_vocab_size
from spear_megatron.model.shape import ModelShape
from spear_megatron.model.weight_map import unwrap
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.state import initialize


def _build(folder: Path, tp: int, pp: int, dtype: torch.dtype = torch.float32) -> tuple[list, ModelShape, Any]:
    parallel = initialize(tp=tp, pp=pp, timeout_s=60)
    shape = ModelShape.from_folder(folder)
    megatron = MegatronConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return build_model(shape, megatron, dtype=dtype, parallel=parallel), shape, parallel


def _load_refused(good: Path, bad: Path, bad_on_rank: int | None) -> tuple[str, bool]:
    """(message, whether any weight changed); with ``bad_on_rank`` only that rank sees the bad folder."""
    chunks, shape, parallel = _build(good, 2, 1)
    for parameter in chunks[0].parameters():
        parameter.data.fill_(7.0)
    folder = bad if bad_on_rank in (None, parallel.rank) else good
    with pytest.raises(ValueError) as error:
        load_hf_folder(chunks, shape, folder, parallel)
    return str(error.value), any(bool((p != 7.0).any()) for p in chunks[0].parameters())


@pytest.mark.parametrize("bad_on_rank", [None, 1])
def test_a_bad_folder_is_refused_on_every_rank_before_a_weight_is_touched(
    bad_on_rank: int | None, tmp_path: Path
) -> None:
    good = make_tiny_hf(tmp_path / "good")
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    tensors = load_file(bad / SINGLE_NAME)
    name = "model.layers.3.mlp.down_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, bad / SINGLE_NAME)
    results = run_ranks(_load_refused, 2, good, bad, bad_on_rank)
    for message, changed in results:
        assert name in message and str(bad / SINGLE_NAME) in message and not changed
    assert results[0] == results[1]


def _padding_rows(folder: Path) -> list[tuple[int, int, float]]:
    """(rows, rows that are not 0 from the vocabulary's end on, sum of all) of the embedding and output parts."""
    chunks, shape, parallel = _build(folder, 2, 1)
    for parameter in chunks[0].parameters():
        parameter.data.fill_(float("nan"))
    load_hf_folder(chunks, shape, folder, parallel)
    gpt = unwrap(chunks[0])
    result = []
    for weight in (gpt.embedding.word_embeddings.weight, gpt.output_layer.weight):
        valid = max(0, min(len(weight), shape.vocab_size - parallel.tp_rank * len(weight)))
        result.append((len(weight), int((weight[valid:] != 0).sum()), float(weight.sum())))
    return result


def test_padding_rows_are_zero_even_when_a_rank_holds_nothing_else(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "m", vocab_size=20, tie_word_embeddings=False)
    results = run_ranks(_padding_rows, 2, folder)
    assert padded_vocab_size(20, 2) == 64
    for part, other in zip(*results):
        assert part[:2] == other[:2] == (32, 0)
        assert part[2] == part[2] and other[2] == 0.0  # finite on the first rank, nothing but padding on the second


def _convert(folder: Path, out: Path, dtype: torch.dtype | None, model_dtype: torch.dtype) -> None:
    chunks, shape, parallel = _build(folder, 1, 2, model_dtype)
    load_hf_folder(chunks, shape, folder, parallel)
    export_hf(chunks, shape, parallel, out, folder, dtype=dtype)


def _with_companions(folder: Path) -> dict[str, bytes]:
    files = {
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b'{"model_max_length": 512}',
        "chat_template.jinja": b"{{ messages }}",
        "generation_config.json": b'{"temperature": 0.6}',
        "merges.txt": b"a b\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("not part of the model")
    return files


def test_sharded_source_single_file_export_with_companions(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "m", "qwen2", max_shard_size="20KB", tie_word_embeddings=False)
    companions = _with_companions(folder)
    run_ranks(_convert, 2, folder, tmp_path / "out", None, torch.float32)
    exported = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert exported.keys() == {*companions, "config.json", SINGLE_NAME}
    assert companions.items() <= exported.items()
    assert exported["config.json"] == (folder / "config.json").read_bytes()
    source = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in load_file(tmp_path / "out" / SINGLE_NAME).items():
        assert torch.equal(tensor, source.pop(name))
    assert not source


def test_export_replaces_an_older_folder_whole_and_declares_its_dtype(tmp_path: Path) -> None:
    folder, out = make_tiny_hf(tmp_path / "m"), tmp_path / "runs" / "out"
    out.mkdir(parents=True)
    (out / INDEX_NAME).write_text("{}")
    for leftover in (".out.partial", ".out.old"):  # of an export that was killed
        (out.parent / leftover).mkdir()
        (out.parent / leftover / "half").write_text("a")
    run_ranks(_convert, 2, folder, out, torch.bfloat16, torch.float32)
    assert {file.name for file in out.iterdir()} == {"config.json", SINGLE_NAME, "generation_config.json"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    before = json.loads((folder / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == before | {"dtype": "bfloat16"}
    source = load_file(folder / SINGLE_NAME)
    assert all(torch.equal(t, source[name].bfloat16()) for name, t in load_file(out / SINGLE_NAME).items())


def test_a_bf16_model_in_fp32_and_back_is_bit_exact(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "m", dtype=torch.bfloat16)
    run_ranks(_convert, 2, folder, tmp_path / "wide", None, torch.float32)
    run_ranks(_convert, 2, tmp_path / "wide", tmp_path / "back", None, torch.bfloat16)
    source, back = load_file(folder / SINGLE_NAME), load_file(tmp_path / "back" / SINGLE_NAME)
    assert source.keys() == back.keys() and all(torch.equal(back[name], source[name]) for name in source)


def _export_fails(folder: Path, out: Path, source: Path) -> str:
    chunks, shape, parallel = _build(folder, 1, 2)
    load_hf_folder(chunks, shape, folder, parallel)
    with pytest.raises(RunError) as error:
        export_hf(chunks, shape, parallel, out, source)
    assert len(list(iter_hf_tensors(chunks, shape, parallel))) == len(shape.parameter_shapes())
    return str(error.value)


def test_a_failing_writer_is_reported_on_every_rank(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "m")
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    messages = run_ranks(_export_fails, 2, folder, blocked / "out", folder)
    assert messages[0] == messages[1] and str(blocked / "out") in messages[0]
    assert blocked.read_text() == "in the way"


@pytest.mark.parametrize("config", [None, "{"])
def test_a_failed_export_leaves_the_older_folder_alone(config: str | None, tmp_path: Path) -> None:
    folder, source, out = make_tiny_hf(tmp_path / "m"), tmp_path / "source", tmp_path / "runs" / "out"
    source.mkdir()
    if config is not None:
        (source / "config.json").write_text(config)
    out.mkdir(parents=True)
    (out / "keep").write_text("old")
    messages = run_ranks(_export_fails, 2, folder, out, source)
    assert messages[0] == messages[1]
    assert [path.name for path in out.parent.iterdir()] == ["out"] and (out / "keep").read_text() == "old"
    out.rename(out.with_name(".out.old"))  # as after a kill between the two renames of an export
    run_ranks(_export_fails, 2, folder, out, source)
    assert [path.name for path in out.parent.iterdir()] == ["out"] and (out / "keep").read_text() == "old"


def _export_slowly(folder: Path, out: Path, seconds: float) -> None:
    parallel = initialize(timeout_s=seconds / 2)
    shape = ModelShape.from_folder(folder)
    chunks = build_model(shape, MegatronConfig(), dtype=torch.float32, parallel=parallel)
    load_hf_folder(chunks, shape, folder, parallel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_export, "copy_companions", lambda *folders: time.sleep(seconds))
        export_hf(chunks, shape, parallel, out, folder)
        export_hf(chunks, shape, parallel, out, folder)


@pytest.mark.slow
def test_writing_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    run_ranks(_export_slowly, 2, make_tiny_hf(tmp_path / "m"), tmp_path / "out", 6.0)
    assert (tmp_path / "out" / SINGLE_NAME).exists()


def _wrong_sizes(folder: Path) -> None:
    parallel = initialize(tp=1, pp=1, timeout_s=60)
    build_model(
        ModelShape.from_folder(folder),
        MegatronConfig(tensor_model_parallel_size=2),
        dtype=torch.float32,
        parallel=parallel,
    )


def test_a_model_of_other_sizes_than_the_groups_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="initialise them with the same sizes"):
        run_ranks(_wrong_sizes, 1, make_tiny_hf(tmp_path / "m"))
