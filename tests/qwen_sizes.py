"""Shapes of published models, as their config.json gives them, and a tiny one."""

from __future__ import annotations

from typing import Any

from spear_megatron.model.shape import ModelShape

_COMMON: dict[str, Any] = {
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
QWEN25_32B_CONFIG: dict[str, Any] = _COMMON | {
    "model_type": "qwen2",
    "num_attention_heads": 40,
    "intermediate_size": 27648,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
QWEN3_32B_CONFIG: dict[str, Any] = _COMMON | {
    "model_type": "qwen3",
    "num_attention_heads": 64,
    "head_dim": 128,
    "intermediate_size": 25600,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
QWEN25_32B = ModelShape.from_hf_config(QWEN25_32B_CONFIG)
QWEN3_32B = ModelShape.from_hf_config(QWEN3_32B_CONFIG)
TINY = ModelShape.from_hf_config(
    {
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": 101,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
)
