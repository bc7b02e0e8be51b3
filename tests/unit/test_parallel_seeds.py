"""Keys and generators: stable, distinct, independent of the order of calls."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.parallel.seeds import derive_key, generator

Arguments = st.tuples(st.integers(), st.text(max_size=8), st.lists(st.integers(), max_size=3))


def test_key_is_the_documented_hash() -> None:
    digest = hashlib.blake2b(b"7:5:noise:3,-1", digest_size=8).digest()
    assert derive_key(7, "noise", 3, -1) == int.from_bytes(digest, "little")
    assert 0 <= derive_key(0, "x") < 2**64


@given(Arguments, Arguments)
def test_different_arguments_give_different_keys(a: tuple, b: tuple) -> None:
    same = derive_key(a[0], a[1], *a[2]) == derive_key(b[0], b[1], *b[2])
    assert same == (a == b)


def test_neighbouring_keys_share_no_pattern() -> None:
    keys = [derive_key(seed, "p", i, j) for seed, i, j in itertools.product(range(10), repeat=3)]
    assert len(set(keys)) == 1000
    bits = torch.tensor([[key >> b & 1 for b in range(64)] for key in keys], dtype=torch.float32)
    assert (bits.mean(0) - 0.5).abs().max() < 0.08  # 5 standard deviations


def test_generators_are_reproducible_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    draws = [torch.rand(3, generator=generator(1, "a", 2)) for _ in range(2)]
    assert torch.equal(*draws) and not torch.equal(draws[0], torch.rand(3, generator=generator(1, "a", 3)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size"),
        ({"context_parallel_size": 0}, "context_parallel_size"),
        ({"virtual_pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size > 1"),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 1}, "at least 2"),
        ({"sequence_parallel": True}, "sequence_parallel"),
        ({"recompute_granularity": "some"}, "recompute_granularity"),
        ({"recompute_granularity": "full"}, "recompute_method"),
        ({"recompute_method": "block"}, "recompute_granularity=full"),
        ({"recompute_granularity": "full", "recompute_method": "x", "recompute_num_layers": 1}, "recompute_method"),
        ({"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 0}, "at least 1"),
    ],
)
def test_bad_parallel_settings_are_refused_by_name(fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"actor_rollout_ref.actor.megatron.*{named}"):
        MegatronConfig(**fields)
