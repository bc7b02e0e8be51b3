"""Checks of a request before anything runs."""

from __future__ import annotations

import math

from spear_megatron.rollout.config import LOWEST_TEMPERATURE
from spear_megatron.rollout.engine import GenerateRequest, SamplingParams


def check_request(request: GenerateRequest, *, vocab_size: int, max_model_len: int) -> None:
    """Raise ValueError, naming the request and the field, for one that the engine can never serve."""
    where = f"request {request.request_id!r}"
    if not request.input_ids:
        raise ValueError(f"{where} has no input_ids")
    _check_ids(where, "input_ids", request.input_ids, vocab_size)
    _check_ids(where, "stop_token_ids", request.sampling.stop_token_ids, vocab_size)
    if not isinstance(request.noise_key, int) or not 0 <= request.noise_key < 1 << 64:
        raise ValueError(f"{where}: noise_key must be an integer of 64 bits, got {request.noise_key!r}")
    _check_sampling(where, request.sampling)
    total = len(request.input_ids) + request.sampling.max_new_tokens
    if total > max_model_len:
        raise ValueError(
            f"{where}: {len(request.input_ids)} input ids and max_new_tokens={request.sampling.max_new_tokens} exceed "
            f"max_model_len={max_model_len}"
        )


def _check_ids(where: str, field: str, ids: tuple[int, ...], vocab_size: int) -> None:
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) < vocab_size)):
        return  # prompts are long: the loop below only finds the place of an error
    for position, token in enumerate(ids):
        if not _is_integer(token) or not 0 <= token < vocab_size:
            raise ValueError(f"{where}: {field}[{position}] = {token!r} is outside the vocabulary of {vocab_size}")


def _is_integer(value: object) -> bool:
    return type(value) is int


def _check_sampling(where: str, sampling: SamplingParams) -> None:
    if not _is_integer(sampling.max_new_tokens) or sampling.max_new_tokens < 1:
        raise ValueError(f"{where}: max_new_tokens must be a positive integer, got {sampling.max_new_tokens!r}")
    if sampling.temperature != 0 and not LOWEST_TEMPERATURE <= sampling.temperature < math.inf:
        raise ValueError(
            f"{where}: temperature must be 0 (greedy) or finite and at least {LOWEST_TEMPERATURE}, "
            f"got {sampling.temperature!r}"
        )
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"{where}: top_p must lie in (0, 1], got {sampling.top_p!r}")
    if not _is_integer(sampling.top_k) or (sampling.top_k != -1 and sampling.top_k < 1):
        raise ValueError(f"{where}: top_k must be -1 (off) or a positive integer, got {sampling.top_k!r}")
