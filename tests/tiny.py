"""Tiny Hugging Face models for tests: seeded weights large enough that a wrong one is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_DEFAULTS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}


def make_tiny_hf(
    directory: str | Path,
    arch: str = "qwen3",
    *,
    seed: int = 0,
    std: float = 0.2,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random Qwen2 or Qwen3 model (``arch``) in Hugging Face format; returns the folder.

    Keyword arguments override fields of the transformers config (``num_layers`` is short for ``num_hidden_layers``).
    Matrices and biases are normal with ``std``, norm weights uniform in [0.5, 1.5].
    """
    import transformers

    fields = _DEFAULTS | ({"head_dim": 8} if arch == "qwen3" else {}) | overrides
    if "num_layers" in fields:
        fields["num_hidden_layers"] = fields.pop("num_layers")
    theta = fields.pop("rope_theta")
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    config_class, model_class = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[arch]
    model = model_class(config_class(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return Path(directory)
