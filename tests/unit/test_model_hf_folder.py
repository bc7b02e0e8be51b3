"""Damaged model folders are refused with one sentence that names tensor and file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_hf

from spear_megatron.model.hf_export import plan_shards
from spear_megatron.model.hf_folder import INDEX_NAME, SINGLE_NAME, HFWeights
from spear_megatron.model.shape import ModelShape

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("hf") / "model", num_layers=2)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_hf(tmp_path_factory.mktemp("hf") / "sharded", num_layers=2, max_shard_size="20KB")
    assert (folder / INDEX_NAME).exists()
    return folder


def _changed(source: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME)
    return folder


def _open(folder: Path) -> HFWeights:
    return HFWeights.open(folder, ModelShape.from_folder(folder))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(Q_PROJ), f"lacks tensor {Q_PROJ}"),
        (lambda t: [t.pop(name) for name in list(t) if "norm" in name], "and .* more"),
        (lambda t: t.update({"model.layers.2.x": torch.zeros(1)}), f"{SINGLE_NAME} holds tensor model.layers.2.x"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1].clone()}), f"{Q_PROJ} in .*{SINGLE_NAME} has shape .31, 32."),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].flatten()}), f"{Q_PROJ} in .*{SINGLE_NAME} has shape .1024."),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.float8_e4m3fn)}), f"{Q_PROJ} .* dtype F8_E4M3"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(3, 32)}), "lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[Tensors], object], named: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=named) as error:
        _open(_changed(source, tmp_path / "m", change))
    assert "\n" not in str(error.value)


def test_a_redundant_output_matrix_of_a_tied_model_is_ignored(source: Path, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert "lm_head.weight" in _open(_changed(source, tmp_path / "m", add)).files


def test_reads_rows_and_columns_of_single_and_sharded_folders(source: Path, sharded: Path) -> None:
    for folder in (source, sharded):
        everything = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        with _open(folder) as weights:
            for name, tensor in everything.items():
                assert torch.equal(weights.read(name), tensor)
                assert torch.equal(weights.read(name, 0, 1, 3), tensor[1:4])
            assert torch.equal(weights.read(Q_PROJ, 1, 4, 8), everything[Q_PROJ][:, 4:12])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / SINGLE_NAME).unlink(), "neither"),
        (lambda f: (f / SINGLE_NAME).write_bytes((f / SINGLE_NAME).read_bytes()[:-10]), SINGLE_NAME),
        (lambda f: (f / SINGLE_NAME).write_bytes(b""), SINGLE_NAME),
        (lambda f: (f / SINGLE_NAME).write_bytes(b"\xff" * 64), SINGLE_NAME),
        (lambda f: (f / INDEX_NAME).write_text("[]"), INDEX_NAME),
        (lambda f: (f / INDEX_NAME).write_text('{"weight_map": {"a": 1}}'), INDEX_NAME),
        (lambda f: (f / INDEX_NAME).write_text('{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors"),
    ],
)
def test_damaged_files_are_named(damage: Callable[[Path], object], named: str, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(ValueError, match=named):
        _open(tmp_path / "m")


def test_a_tensor_in_two_files_is_refused(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "m")
    first, second = sorted((tmp_path / "m").glob("*.safetensors"))[:2]
    save_file(load_file(second) | dict([next(iter(load_file(first).items()))]), second)
    with pytest.raises(ValueError, match="is both in"):
        _open(tmp_path / "m")


def test_random_damage_to_the_header_gives_one_value_error_or_loads(source: Path, tmp_path: Path) -> None:
    content = (source / SINGLE_NAME).read_bytes()
    header_bytes = int.from_bytes(content[:8], "little") + 8
    shutil.copytree(source, tmp_path / "m")
    shape, choose = ModelShape.from_folder(source), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(choose.randint(1, 3)):
            damaged[choose.randrange(header_bytes)] = choose.randrange(256)
        (tmp_path / "m" / SINGLE_NAME).write_bytes(damaged)
        try:
            HFWeights.open(tmp_path / "m", shape)
        except ValueError as error:
            refused += 1
            assert str(tmp_path / "m") in str(error)
    assert refused > 200


def test_shards_hold_every_tensor_in_order_within_the_limit(source: Path) -> None:
    shape = ModelShape.from_folder(source)
    sizes = {name: torch.Size(s).numel() * 2 for name, s in shape.parameter_shapes().items()}
    for limit in (1, 5_000, 10_000, 10**9):
        shards = plan_shards(shape, torch.bfloat16, limit)
        assert [name for shard in shards for name in shard] == list(shape.parameter_shapes())
        assert all(len(shard) == 1 or sum(sizes[name] for name in shard) <= limit for shard in shards)
    assert len(plan_shards(shape, torch.bfloat16, 10**9)) == 1


def test_the_index_of_transformers_is_understood(sharded: Path) -> None:
    named = json.loads((sharded / INDEX_NAME).read_text())["weight_map"]
    assert {name: file.name for name, file in _open(sharded).files.items()} == named
