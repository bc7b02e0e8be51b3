"""Sampling: the keyed noise, the distribution it draws from, temperature, top-k and top-p."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from engine_models import make_engine, request, run, tiny_model

from spear_megatron.kernels.decoder import keyed_uniform
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.seeds import derive_key

PROMPT = (5, 17, 3, 200, 41)


@pytest.fixture(scope="module")
def peaked() -> tuple[Any, ModelShape]:
    """A model whose next-token distribution has a few likely tokens and a long tail."""
    return tiny_model("qwen3-untied", scale=0.12)


def philox(key: int, position: int) -> float:
    """Philox4x32-10 written from the paper, in Python integers."""
    counter = [position & 0xFFFFFFFF, position >> 32, 0, 0]
    keys = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ keys[0], b & 0xFFFFFFFF, (a >> 32) ^ counter[3] ^ keys[1], a & 0xFFFFFFFF]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return ((counter[0] << 32 | counter[1]) >> 11) * 2.0**-53


def test_uniform_is_philox() -> None:
    for key in (0, 1, (1 << 64) - 1, derive_key(7, "noise", 3)):
        for position in (0, 1, 4095, (1 << 40) + 5):
            assert keyed_uniform(key, position) == philox(key, position)


def test_uniform_is_uniform_along_keys_and_positions() -> None:
    for values in ([keyed_uniform(k, 9) for k in range(20000)], [keyed_uniform(9, p) for p in range(20000)]):
        counts = torch.histc(torch.tensor(values), 50, 0, 1)
        assert float(((counts - 400) ** 2 / 400).sum()) < 94  # chi-square, 49 degrees, p = 1e-4


@torch.no_grad()
def next_logits(model: Any) -> torch.Tensor:
    return model(torch.tensor([PROMPT])).logits[0, -1]


def draw(pair: tuple[Any, ModelShape], count: int, **sampling: Any) -> list[int]:
    """Next tokens after PROMPT under many keys."""
    engine = make_engine(*pair, max_model_len=16)
    keys = [derive_key(1, "draw", i) for i in range(count)]
    results = run(engine, [request(PROMPT, key=key, max_new_tokens=1, **sampling) for key in keys])
    return [result.output_ids[0] for result in results]


def assert_drawn_from(tokens: list[int], probabilities: torch.Tensor) -> None:
    """Chi-square at p = 1e-4 (Wilson-Hilferty), cells of fewer than 5 expected draws merged."""
    counts, expected = Counter(tokens), probabilities.double() * len(tokens)
    assert all(probabilities[token] > 0 for token in counts)
    cells = [(counts[i], float(e)) for i, e in enumerate(expected) if e >= 5]
    rest = len(tokens) - sum(c for c, _ in cells), len(tokens) - sum(e for _, e in cells)
    if rest[1] >= 5:
        cells.append(rest)
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    degrees = len(cells) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert degrees >= 2 and statistic < limit


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_draws_follow_softmax(peaked: tuple[Any, ModelShape], temperature: float) -> None:
    tokens = draw(peaked, 4000, temperature=temperature)
    assert_drawn_from(tokens, torch.softmax(next_logits(peaked[0]) / temperature, -1))


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 0.7), (7, 1.0), (12, 0.6), (10**6, 0.9), (1000, 0.999)])
def test_restricted_draws_follow_the_warpers(peaked: tuple[Any, ModelShape], top_k: int, top_p: float) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = next_logits(peaked[0])[None] / 0.8
    if top_k > 0:
        scores = TopKLogitsWarper(min(top_k, scores.shape[1]))(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    tokens = draw(peaked, 3000, temperature=0.8, top_k=top_k, top_p=top_p)
    assert_drawn_from(tokens, torch.softmax(scores[0], -1))


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(peaked: tuple[Any, ModelShape]) -> None:
    best = int(next_logits(peaked[0]).argmax())
    assert set(draw(peaked, 20, top_k=1)) == set(draw(peaked, 20, top_p=1e-6)) == {best}


def test_log_probs_are_unrestricted(peaked: tuple[Any, ModelShape]) -> None:
    expected = torch.log_softmax(next_logits(peaked[0]).double() / 0.8, -1)
    engine = make_engine(*peaked)
    for key in range(10):
        ask = request(PROMPT, key=key, max_new_tokens=1, temperature=0.8, top_k=3, top_p=0.9)
        result = run(engine, [ask])[0]
        assert result.log_probs[0] == pytest.approx(float(expected[result.output_ids[0]]), abs=1e-5)


def test_noise_is_decided_by_key_and_absolute_position(peaked: tuple[Any, ModelShape]) -> None:
    """A completion cut in two requests draws what one request draws; another key draws something else."""
    engine = make_engine(*peaked)
    whole = run(engine, [request(PROMPT, key=42, max_new_tokens=12)])[0]
    half = run(engine, [request(PROMPT, key=42, max_new_tokens=5)])[0]
    rest = run(engine, [request([*PROMPT, *half.output_ids], key=42, max_new_tokens=7)])[0]
    assert half.output_ids + rest.output_ids == whole.output_ids
    assert half.log_probs + rest.log_probs == whole.log_probs
    assert run(engine, [request(PROMPT, key=43, max_new_tokens=12)])[0].output_ids != whole.output_ids


def test_a_large_vocabulary_is_drawn_by_the_same_inverse_cdf() -> None:
    """Token = first index whose cumulative probability exceeds the keyed uniform, over many chunks of the sum."""
    import dataclasses

    from spear_megatron.rollout.embedded import EmbeddedEngine

    _, base = tiny_model("qwen2-untied")
    shape = dataclasses.replace(base, vocab_size=3001)
    generator = torch.Generator().manual_seed(0)
    sizes = shape.parameter_shapes().items()
    weights = {name: torch.randn(size, generator=generator) * 0.05 for name, size in sizes}
    engine = EmbeddedEngine(shape, max_num_seqs=8, max_model_len=16, num_threads=1)
    engine.update_weights(weights.items(), version=0)
    for key in range(64):
        result = run(engine, [request(PROMPT, key=key, max_new_tokens=1)])[0]
        assert 0 <= result.output_ids[0] < 3001
    drawn = [run(engine, [request(PROMPT, key=k, max_new_tokens=1)])[0].output_ids[0] for k in range(40)]
    by_noise = [token for _, token in sorted((philox(k, len(PROMPT)), token) for k, token in enumerate(drawn))]
    assert by_noise == sorted(by_noise)  # one distribution: more noise never gives an earlier token
