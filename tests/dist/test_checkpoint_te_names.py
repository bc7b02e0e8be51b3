"""Checkpoints of Megatron-LM: Transformer Engine's layer names, extra states, its folders and arguments."""

from __future__ import annotations

import argparse
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.transformer.enums import AttnBackend
from te_model import SCALING_STATE, build_te_model
from test_checkpoint_convert import read, with_tokenizer
from tiny import make_tiny_hf

from spear_megatron.__main__ import main
from spear_megatron.checkpoint.conversion.sources import check_arguments
from spear_megatron.checkpoint.conversion.torch_dist import TorchDistReader
from spear_megatron.checkpoint.convert import hf_to_mcore, mcore_to_hf
from spear_megatron.checkpoint.sharded import load_sharded
from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.device.platform import Platform
from spear_megatron.model.global_map import SEPARATE_NORMS, global_parameters
from spear_megatron.model.hf_io import iter_hf_tensors, load_hf_folder
from spear_megatron.model.provider import build_model, padded_vocab_size
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.parallel.state import ParallelState, initialize

ARCHITECTURES: dict[str, dict[str, Any]] = {"qwen3": {}, "qwen2": {"tie_word_embeddings": False}}


class _Kind(enum.Enum):
    """Stands for the classes of a training script that its arguments hold."""

    DENSE = 1


@pytest.fixture(autouse=True)
def _single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def parallel() -> Iterator[ParallelState]:
    with megatron_on_cpu():
        state = initialize(platform=Platform(device=torch.device("cpu"), backend="gloo"))
        yield state
        if torch.distributed.is_initialized():
            state.destroy()


@pytest.fixture(params=ARCHITECTURES)
def hf(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder = make_tiny_hf(tmp_path / "hf", request.param, num_layers=2, **ARCHITECTURES[request.param])
    return with_tokenizer(folder)


def model_state(shape: ModelShape, hf: Path, vocab_rows: int, parallel: ParallelState) -> dict[str, Any]:
    """Sharded state of a model with Transformer Engine's layers that holds the weights of ``hf``."""
    model = build_te_model(shape, padded_vocab_size(shape.vocab_size, 1))
    load_hf_folder([model], shape, hf, parallel)
    if vocab_rows == padded_vocab_size(shape.vocab_size, 1):
        return model.sharded_state_dict()
    larger, weights = build_te_model(shape, vocab_rows), model.state_dict()
    for name, value in larger.state_dict().items():
        if isinstance(value, torch.Tensor) and "_extra_state" not in name:
            value[: weights[name].shape[0]] = weights[name]
    return larger.sharded_state_dict()


def save_like_megatron_lm(root: Path, state: dict[str, Any], shape: ModelShape, **changes: Any) -> None:
    """What the training script leaves: the model, something of an optimizer, arguments, and the tracker file."""
    folder = root / "iter_0000100"
    folder.mkdir(parents=True)
    arguments = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": shape.num_key_value_heads,
        "rotary_base": int(shape.rope_theta),
        "untie_embeddings_and_output_weights": not shape.tie_word_embeddings,
        "attention_backend": AttnBackend.flash,
    }
    moments = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.ones(3))
    everything = {
        "args": argparse.Namespace(**arguments | changes),
        "iteration": 100,
        "model": state,
        "optimizer": {"state": moments},
    }
    dist_checkpointing.save(everything, str(folder))
    (root / "latest_checkpointed_iteration.txt").write_text("100\n")


def plain_tensors(folder: Path, shape: ModelShape, parallel: ParallelState) -> dict[str, torch.Tensor]:
    """The weights that the plain layers get from a checkpoint, by Hugging Face name."""
    chunks = build_model(
        shape, MegatronConfig(), dtype=torch.float32, parallel=parallel, kernels="eager", with_ddp=False
    )
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.fill_(float("nan"))
    load_sharded(parallel, folder, chunks, None)
    return {name: value for name, value in iter_hf_tensors(chunks, shape, parallel) if value is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_checkpoint_of_megatron_lm(
    hf: Path, tmp_path: Path, parallel: ParallelState, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ModelShape.from_folder(hf)
    expected = read(hf)
    state = model_state(shape, hf, padded_vocab_size(shape.vocab_size, 1), parallel)
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in state and "input_layernorm" not in str(list(state))
    assert any("core_attention._extra_state" in key for key in state)
    save_like_megatron_lm(tmp_path / "stock", state, shape)
    assert_equal(plain_tensors(tmp_path / "stock" / "iter_0000100", shape, parallel), expected)
    parallel.destroy()
    arguments = ["convert", "mcore-to-hf", "--mcore", str(tmp_path / "stock"), "--out", str(tmp_path / "back")]
    assert main(arguments) == 2
    assert "give --hf-config DIR" in capsys.readouterr().err
    assert main([*arguments, "--hf-config", str(hf)]) == 0
    assert_equal(read(tmp_path / "back"), expected)
    assert (tmp_path / "back" / "chat_template.jinja").read_bytes() == (hf / "chat_template.jinja").read_bytes()


@pytest.mark.parametrize("separate", [True, False], ids=["separate norms", "other padding"])
def test_other_names_and_paddings(tmp_path: Path, parallel: ParallelState, separate: bool) -> None:
    hf = make_tiny_hf(tmp_path / "hf", num_layers=2)
    shape, expected = ModelShape.from_folder(hf), read(hf)
    state = model_state(shape, hf, 128 if separate else 256, parallel)
    if separate:
        for tensor in nested_values(state):
            for fused, own in SEPARATE_NORMS.items():
                tensor.key = tensor.key.replace(fused, own)
    save_like_megatron_lm(tmp_path / "stock", state, shape)
    assert_equal(plain_tensors(tmp_path / "stock" / "iter_0000100", shape, parallel), expected)
    parallel.destroy()
    mcore_to_hf(tmp_path / "stock" / "iter_0000100", tmp_path / "back", hf_config=hf)
    assert_equal(read(tmp_path / "back"), expected)


def test_layers_that_are_not_stacked(tmp_path: Path, parallel: ParallelState) -> None:
    hf = make_tiny_hf(tmp_path / "hf", "qwen2", num_layers=2, dtype=torch.bfloat16)
    shape = ModelShape.from_folder(hf)
    model = build_te_model(shape, 128, torch.bfloat16)
    load_hf_folder([model], shape, hf, parallel)
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    assert any(tensor.key == "decoder.layers.1.mlp.linear_fc2.weight" for tensor in sharded_tensors(state))
    save_like_megatron_lm(tmp_path / "stock", state, shape)
    parallel.destroy()
    mcore_to_hf(tmp_path / "stock", tmp_path / "back", hf_config=hf)
    assert_equal(read(tmp_path / "back"), read(hf))


def test_what_is_written_is_what_transformer_engine_layers_expect(
    hf: Path, tmp_path: Path, parallel: ParallelState
) -> None:
    parallel.destroy()
    written = hf_to_mcore(hf, tmp_path / "mcore") / "sharded"
    again = initialize(platform=Platform(device=torch.device("cpu"), backend="gloo"))
    shape = ModelShape.from_folder(hf)
    model = build_te_model(shape, padded_vocab_size(shape.vocab_size, 1))
    state = model.sharded_state_dict()
    expected = {value.key: tuple(value.global_shape) for value in sharded_tensors(state)}
    found = dist_checkpointing.load_tensors_metadata(str(written))
    assert {key: tuple(value.global_shape) for key, value in found.items()} == expected
    assert len(expected) >= 9

    loaded = dist_checkpointing.load(state, str(written), strict=StrictHandling.LOG_ALL)
    model.load_state_dict(loaded, strict=False)  # strict would ask for the states of modules that save none here
    assert_equal({n: v for n, v in iter_hf_tensors([model], shape, again) if v is not None}, read(hf))
    again.destroy()


def sharded_tensors(state: dict[str, Any]) -> list[ShardedTensor]:
    copied = dict(state)
    apply_factories(copied)
    return [value for value in nested_values(copied) if isinstance(value, ShardedTensor)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_query_groups": 4}, r"num_query_groups=4, but config\.json says 2"),
        ({"rotary_base": 500000}, r"rotary_base=500000, but config\.json says 10000"),
        ({"untie_embeddings_and_output_weights": True}, "untie_embeddings_and_output_weights=True"),
    ],
)
def test_another_models_config_is_refused(
    tmp_path: Path, parallel: ParallelState, changes: dict[str, Any], message: str
) -> None:
    hf = make_tiny_hf(tmp_path / "hf", num_layers=2)
    shape = ModelShape.from_folder(hf)
    (tmp_path / "stock").mkdir()
    noted = {"num_query_groups": 2, "rotary_base": 10000, "kind": _Kind.DENSE} | changes
    torch.save({"args": argparse.Namespace(**noted), "scaling": SCALING_STATE}, tmp_path / "stock" / "common.pt")
    with pytest.raises(ValueError, match=message):
        check_arguments(tmp_path / "stock", shape)


def test_a_misshapen_or_damaged_checkpoint_names_the_tensor(tmp_path: Path, parallel: ParallelState) -> None:
    hf = make_tiny_hf(tmp_path / "hf", num_layers=2)
    shape = ModelShape.from_folder(hf)
    model = build_te_model(shape, 128)
    load_hf_folder([model], shape, hf, parallel)
    save_like_megatron_lm(tmp_path / "stock", model.sharded_state_dict(), shape)
    parallel.destroy()
    expected = read(hf)["model.layers.1.mlp.down_proj.weight"].numpy().tobytes()
    other = make_tiny_hf(tmp_path / "other", num_layers=2, intermediate_size=64)
    with pytest.raises(ValueError, match=r"linear_fc1\.weight .*shape \[2, 96, 32\].* \[128, 32\] in each layer"):
        mcore_to_hf(tmp_path / "stock", tmp_path / "back", hf_config=other)
    deeper = make_tiny_hf(tmp_path / "deeper", num_layers=3)
    reader = TorchDistReader.open(tmp_path / "stock" / "iter_0000100")
    with pytest.raises(ValueError, match="has 2 layers, but config.json asks for 3"):
        reader.check(global_parameters(ModelShape.from_folder(deeper)))
    with pytest.raises(ValueError, match="num_layers=2, but config.json says 3"):
        mcore_to_hf(tmp_path / "stock", tmp_path / "back", hf_config=deeper)
    assert not (tmp_path / "back").exists()

    (file,) = [path for path in (tmp_path / "stock" / "iter_0000100").glob("*.distcp") if expected in path.read_bytes()]
    file.write_bytes(file.read_bytes().replace(expected, bytes([expected[0] ^ 1]) + expected[1:]))
    with pytest.raises(ValueError, match=r"tensor decoder\.layers\.mlp\.linear_fc2\.weight in .*its CRC-32 differs"):
        mcore_to_hf(tmp_path / "stock", tmp_path / "back", hf_config=hf)
