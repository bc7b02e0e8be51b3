"""Which model is trained and in which precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Keys under ``actor_rollout_ref.model``.

    ``path`` is a folder in Hugging Face format (config.json, safetensors, tokenizer). ``dtype`` is that of weights
    and activations, fp32 or bf16; gradients are accumulated and optimizer states are kept in fp32 either way.
    """

    path: str = ""
    """Model folder in Hugging Face format: config.json, safetensors, tokenizer."""
    dtype: str = "bf16"
    """fp32 or bf16 weights and activations; gradients are accumulated and optimizer states kept in fp32."""

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"actor_rollout_ref.model.dtype must be fp32 or bf16, got {self.dtype!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]
