"""Shapes from config.json: published files, transformers' own, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_hf

from spear_megatron.model.config import ModelConfig
from spear_megatron.model.shape import ModelShape
from spear_megatron.model.transformer_config import check_layout
from spear_megatron.parallel.config import MegatronConfig

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data" / "models"
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}
QWEN2 = {k: v for k, v in QWEN3.items() if k != "head_dim"} | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
}


@pytest.mark.parametrize(
    ("file", "parameters", "head_dim"),
    [("qwen2.5-32b-instruct_config.json", 32_763_876_352, 128), ("qwen3-32b_config.json", 32_762_123_264, 128)],
)
def test_published_configs(file: str, parameters: int, head_dim: int) -> None:
    if not (PUBLISHED / file).exists():
        pytest.skip(f"{PUBLISHED / file} is not there")
    shape = ModelShape.from_hf_config(json.loads((PUBLISHED / file).read_text()))
    assert (shape.num_parameters(), shape.head_dim, shape.rope_theta) == (parameters, head_dim, 1e6)
    assert shape.qkv_bias == (shape.architecture == "qwen2") and shape.qk_norm == (shape.architecture == "qwen3")


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_transformers(arch: str, tied: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = make_tiny_hf(tmp_path, arch, tie_word_embeddings=tied, rope_theta=5e5, rms_norm_eps=1e-5)
    shape = ModelShape.from_folder(folder)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert shape.parameter_shapes() == saved
    assert (shape.rope_theta, shape.rms_norm_eps, shape.tie_word_embeddings) == (5e5, 1e-5, tied)


def test_rope_theta_is_read_from_both_places() -> None:
    old = ModelShape.from_hf_config(QWEN3)
    new = {k: v for k, v in QWEN3.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    assert ModelShape.from_hf_config(new) == old
    assert ModelShape.from_hf_config({k: v for k, v in QWEN3.items() if k != "rope_theta"}).rope_theta == 10000.0


def test_head_dim_is_read_or_derived() -> None:
    assert ModelShape.from_hf_config(QWEN3).head_dim == 16
    assert ModelShape.from_hf_config(QWEN2).head_dim == 8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
        ({"model_type": None}, "model_type None"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_attention_heads": 5}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rope_theta": -1}, "rope_theta"),
    ],
)
def test_unsupported_models_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ModelShape.from_hf_config(QWEN3 | change)


def test_a_sliding_window_that_no_layer_uses_is_accepted() -> None:
    ModelShape.from_hf_config(QWEN3 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 4})


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            sorted({*QWEN3, "rope_parameters", "rope_scaling", "layer_types", "num_experts", "use_sliding_window"})
        ),
        st.one_of(
            st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=3), st.lists(st.integers())
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_damage_gives_a_shape_or_one_value_error(change: dict[str, Any]) -> None:
    try:
        shape = ModelShape.from_hf_config(QWEN3 | change)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert all(size > 0 for sizes in shape.parameter_shapes().values() for size in sizes)


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"model_type": "gpt2"}', b"\xff\xfe"])
def test_a_bad_config_file_is_named(content: str | bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=str(tmp_path / "config.json")):
        ModelShape.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "change", "named"),
    [
        ({"pipeline_model_parallel_size": 3}, {}, "4 layers"),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4}, {}, "virtual_pipeline"),
        ({"tensor_model_parallel_size": 3}, {}, "num_attention_heads"),
        ({"tensor_model_parallel_size": 4}, {"intermediate_size": 50}, "intermediate_size"),
        ({"tensor_model_parallel_size": 4}, {"num_attention_heads": 12, "num_key_value_heads": 6}, "key_value_heads"),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"hidden_size": 33}, "hidden_size"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(sizes: dict[str, Any], change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_layout(ModelShape.from_hf_config(QWEN3 | change), MegatronConfig(**sizes))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tensor_sizes_above_and_below_the_kv_heads_fit(tp: int) -> None:
    check_layout(ModelShape.from_hf_config(QWEN3), MegatronConfig(tensor_model_parallel_size=tp))


def test_model_config_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match="actor_rollout_ref.model.dtype"):
        ModelConfig(dtype="fp16")
