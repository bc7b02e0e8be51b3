"""The shape of a model, read from Hugging Face's ``config.json`` and never typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from spear_megatron.parallel.paths import check_input_folder

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_SIZES = (
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_LARGEST = {"num_hidden_layers": 10_000}
_PLAIN_ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything about a dense Qwen2 / Qwen2.5 / Qwen3 decoder that decides its tensors and its arithmetic.

    ``vocab_size`` is the unpadded one, of the Hugging Face embedding. ``qkv_bias`` is a bias on q, k and v;
    ``qk_norm`` an RMSNorm of every query and key head (``head_dim`` weights each).
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.architecture not in _ARCHITECTURES:
            raise ValueError(f"architecture {self.architecture!r} is not supported, only {sorted(_ARCHITECTURES)}")
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelShape:
        """Shape from ``path/config.json``.

        Raises:
            ValueError: the file is missing, is not JSON, or describes an unsupported model; names the file.
            OSError: it cannot be read.
        """
        file = check_input_folder(path, "give a model folder in Hugging Face format") / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{file} does not exist: give a model folder in Hugging Face format") from None
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}")
        try:
            return cls.from_hf_config(config)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Shape from the content of a ``config.json``, published (``rope_theta``) or of transformers 5 style.

        Raises:
            ValueError: a field is missing or malformed, or asks for something unsupported (other architectures,
                mixture of experts, sliding window, rope scaling, other activations); names the field.
        """
        architecture = _architecture(config)
        _refuse_unsupported(config)
        hidden_size, num_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
        qwen3 = architecture == "qwen3"
        qkv_bias = _flag(config, "attention_bias") if qwen3 else True
        if qwen3 and qkv_bias:
            raise ValueError("attention_bias=true is not supported for qwen3 (it would put a bias on o_proj)")
        head_dim = config.get("head_dim")
        if head_dim is None:
            if qwen3:
                head_dim = 128
            elif num_heads and hidden_size % num_heads == 0:
                head_dim = hidden_size // num_heads
            else:
                raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads})")
        num_kv_heads = config.get("num_key_value_heads")
        return cls(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=_integer(config, "num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            intermediate_size=_integer(config, "intermediate_size"),
            vocab_size=_integer(config, "vocab_size"),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            qkv_bias=qkv_bias,
            qk_norm=qwen3,
            rms_norm_eps=_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
            rope_theta=_rope_theta(config),
            max_position_embeddings=_integer(config, "max_position_embeddings"),
        )

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape of every parameter, in the order of the layers. Tied: no ``lm_head.weight``."""
        hidden, head_dim = self.hidden_size, self.head_dim
        q_rows, kv_rows = self.num_attention_heads * head_dim, self.num_key_value_heads * head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
            for name, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
                shapes[f"{prefix}self_attn.{name}.weight"] = (rows, hidden)
                if self.qkv_bias:
                    shapes[f"{prefix}self_attn.{name}.bias"] = (rows,)
            if self.qk_norm:
                shapes[prefix + "self_attn.q_norm.weight"] = (head_dim,)
                shapes[prefix + "self_attn.k_norm.weight"] = (head_dim,)
            shapes[prefix + "self_attn.o_proj.weight"] = (hidden, q_rows)
            shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
            shapes[prefix + "mlp.gate_proj.weight"] = (self.intermediate_size, hidden)
            shapes[prefix + "mlp.up_proj.weight"] = (self.intermediate_size, hidden)
            shapes[prefix + "mlp.down_proj.weight"] = (hidden, self.intermediate_size)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def num_parameters(self) -> int:
        """Number of distinct weights; tied embeddings count once."""
        return sum(prod(shape) for shape in self.parameter_shapes().values())


def _architecture(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise ValueError(
            f"model_type {model_type!r} is not supported: use a dense Qwen2, Qwen2.5 or Qwen3 model "
            f"(model_type {' or '.join(_ARCHITECTURES)})"
        )
    declared = config.get("architectures")
    if declared is not None and declared != [_ARCHITECTURES[model_type]]:
        raise ValueError(f"architectures {declared!r} is not supported: it must be [{_ARCHITECTURES[model_type]!r}]")
    return model_type


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise ValueError(f"{key}={config[key]!r}: mixture-of-experts models are not supported, use a dense one")
    if config.get("quantization_config"):
        raise ValueError("quantization_config: quantised weights are not supported, use the unquantised model")
    layer_types = config.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise ValueError(f"layer_types {layer_types!r}: only a list of full_attention layers is supported")
    if layer_types is not None and len(layer_types) != config.get("num_hidden_layers"):
        raise ValueError(
            f"layer_types names {len(layer_types)} layers, but num_hidden_layers is "
            f"{config.get('num_hidden_layers')!r}: restore config.json"
        )
    if _flag(config, "use_sliding_window") and not layer_types:
        # without layer_types, layers from max_window_layers on use the window
        if _integer(config, "max_window_layers") < _integer(config, "num_hidden_layers"):
            raise ValueError("use_sliding_window=true is not supported: set it to false in config.json")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported, only silu")
    if config.get("attention_dropout"):
        raise ValueError(f"attention_dropout={config['attention_dropout']!r} is not supported: set it to 0.0")


def _rope_theta(config: Mapping[str, Any]) -> float:
    theta = config.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ValueError(f"{key} must be an object, got {rope!r}")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"{key} of type {rope_type!r} is not supported: remove it from config.json (plain rope)")
        unknown = set(rope) - _PLAIN_ROPE_KEYS
        if unknown or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"{key} has unsupported settings {dict(rope)}: only rope_theta is read (plain rope)")
        theta = rope.get("rope_theta", theta)
    return _number(theta, "rope_theta")


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    largest = _LARGEST.get(key, 2**31 - 1)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    if value > largest:
        raise ValueError(f"{key}={value} is no size of a model, at most {largest} is read: restore config.json")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return float(value)
