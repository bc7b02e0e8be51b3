"""The embedded engine against transformers: the same greedy tokens, the same log-probs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import MODELS, make_engine, named_weights, random_prompts, request, run, tiny_model

from spear_megatron.model.shape import ModelShape


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request: pytest.FixtureRequest) -> tuple[Any, ModelShape]:
    return tiny_model(request.param)


@torch.no_grad()
def reference_log_probs(model: Any, ids: list[int], start: int, temperature: float) -> list[float]:
    logits = model(torch.tensor([ids])).logits[0].double() / temperature
    log_probs = torch.log_softmax(logits, -1)
    return [float(log_probs[t - 1, ids[t]]) for t in range(start, len(ids))]


def test_greedy_equals_generate(pair: tuple[Any, ModelShape]) -> None:
    model, shape = pair
    prompts = random_prompts(6, shape.vocab_size, seed=1, longest=70)
    results = run(make_engine(model, shape), [request(ids, temperature=0, max_new_tokens=24) for ids in prompts])
    for ids, result in zip(prompts, results, strict=True):
        # Without the mask, generate would take tokens equal to the padding id for padding.
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        full = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
        full = full[0].tolist()
        assert list(result.output_ids) == full[len(ids) :]
        assert result.finish_reason == "length"
        assert result.log_probs == pytest.approx(reference_log_probs(model, full, len(ids), 1.0), abs=2e-5)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_sampled_log_probs_equal_a_forward_pass(pair: tuple[Any, ModelShape], temperature: float) -> None:
    model, shape = pair
    prompts = random_prompts(5, shape.vocab_size, seed=2)
    requests = [
        request(ids, key=i, temperature=temperature, max_new_tokens=20, top_p=0.8 if i % 2 else 1.0)
        for i, ids in enumerate(prompts)
    ]
    for ids, result in zip(prompts, run(make_engine(model, shape), requests), strict=True):
        full = [*ids, *result.output_ids]
        assert result.log_probs == pytest.approx(reference_log_probs(model, full, len(ids), temperature), abs=2e-5)


def test_bfloat16_weights_are_used_exactly(pair: tuple[Any, ModelShape]) -> None:
    model, shape = pair
    rounded = [(name, tensor.to(torch.bfloat16)) for name, tensor in named_weights(model)]
    engine, reference = make_engine(model, shape), make_engine(model, shape)
    engine.update_weights(rounded, version=2)
    reference.update_weights([(name, tensor.float()) for name, tensor in rounded], version=2)
    prompts = [request(ids, key=5) for ids in random_prompts(3, shape.vocab_size, seed=3)]
    assert run(engine, prompts) == run(reference, prompts)


def test_update_in_place_equals_a_fresh_engine(pair: tuple[Any, ModelShape]) -> None:
    model, shape = pair
    prompts = [request(ids, key=9) for ids in random_prompts(3, shape.vocab_size, seed=4, shortest=40)]
    engine = make_engine(model, shape)
    before = run(engine, prompts)
    changed = [(name, tensor * 1.3) for name, tensor in named_weights(model)]
    engine.update_weights(changed, version=2)
    fresh = make_engine(model, shape)
    fresh.update_weights(changed, version=2)
    after = run(engine, prompts)
    assert after == run(fresh, prompts)
    assert [r.log_probs for r in after] != [r.log_probs for r in before]
