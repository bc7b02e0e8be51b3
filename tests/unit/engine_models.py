"""Tiny Qwen models for the engine's tests, and helpers to run requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.embedded import EmbeddedEngine
from spear_megatron.rollout.engine import GenerateRequest, GenerateResult, SamplingParams

# name -> (model type, settings); head_dim 24 is neither hidden / heads nor a multiple of a vector.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"num_key_value_heads": 4, "hidden_size": 72, "intermediate_size": 100}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 24, "num_key_value_heads": 1}),
    "qwen3-untied": ("qwen3", {"head_dim": 80, "vocab_size": 331, "num_attention_heads": 6}),
}


def tiny_model(name: str, *, seed: int = 0, scale: float = 0.1) -> tuple[Any, ModelShape]:
    """A random transformers model (eval, float32) of ``MODELS`` with biases and norms off their initial values."""
    import transformers

    kind, settings = MODELS[name]
    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **settings,
    }
    config_class = transformers.Qwen2Config if kind == "qwen2" else transformers.Qwen3Config
    model_class = transformers.Qwen2ForCausalLM if kind == "qwen2" else transformers.Qwen3ForCausalLM
    config = config_class(**values)
    model = model_class(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + scale * noise if "norm" in key else scale * noise)
    return model, ModelShape.from_hf_config({**config.to_dict(), "architectures": [model_class.__name__]})


def named_weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    """The model's weights under their Hugging Face names, tied ones once."""
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def make_engine(model: Any, shape: ModelShape, **settings: Any) -> EmbeddedEngine:
    """An engine that holds the model's weights as version 1."""
    values = {"max_num_seqs": 64, "max_model_len": 128, "num_threads": 1, **settings}
    engine = EmbeddedEngine(shape, **values)
    engine.update_weights(named_weights(model), version=1)
    return engine


def request(
    ids: Sequence[int],
    *,
    key: int = 0,
    max_new_tokens: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = -1,
    stop: Sequence[int] = (),
    name: str = "r",
) -> GenerateRequest:
    """A request with the given settings."""
    sampling = SamplingParams(max_new_tokens, temperature, top_p, top_k, tuple(stop))
    return GenerateRequest(name, tuple(ids), sampling, key)


def run(engine: EmbeddedEngine, requests: Sequence[GenerateRequest], *, timeout_s: float = 60) -> list[GenerateResult]:
    """Results of requests that are submitted together, in their order."""

    async def all_of_them() -> list[GenerateResult]:
        return list(await asyncio.wait_for(asyncio.gather(*(engine.generate(r) for r in requests)), timeout_s))

    return asyncio.run(all_of_them())


def random_prompts(
    count: int, vocab_size: int, *, seed: int = 0, shortest: int = 1, longest: int = 60
) -> list[tuple[int, ...]]:
    """Prompts of random lengths and tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(vocab_size, (length,), generator=generator).tolist()) for length in lengths]
