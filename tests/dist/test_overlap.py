"""Overlapped communication trains to the same bits as communication that is waited for.

Buckets of another size cut the optimizer differently over the ranks, so that the norm is summed in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import make_tiny_hf
from train_step import VOCAB, Layout, build_actor, make_rows, share_of_rank, with_trainer_log_probs

REDUCE = {"overlap_grad_reduce": True}
BOTH = {**REDUCE, "overlap_param_gather": True}
BUCKETS = {"ddp_bucket_size": 4000}
DP2 = Layout("DP2", world_size=2, max_tokens=64)
PIPELINE = Layout("PP2 VPP2", world_size=2, pp=2, vpp=2, max_tokens=64)


def train_on_rank(folder: str, layout: Layout, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What three updates give, for each of the settings of Megatron."""
    from spear_megatron.model.hf_io import iter_hf_tensors
    from spear_megatron.trainer.reference import Reference

    results = []
    for fields in settings:
        actor, shape, parallel = build_actor(folder, layout, megatron_fields=fields)
        reference = Reference(actor.chunks)
        norms, log_probs = [], []
        for step in range(3):
            rows, _ = with_trainer_log_probs(actor, share_of_rank(make_rows(seed=step), parallel))
            norms += [actor.update(rows).metrics["actor/grad_norm"], actor.update(rows).metrics["actor/grad_norm"]]
            log_probs += [row.ref_log_probs for row in actor.reference_log_probs(rows, reference)]
            log_probs += [row.old_log_probs for row in actor.log_probs(rows)[0]]
        actor.update(rows)
        actor.settle()
        exported = iter_hf_tensors(actor.chunks, shape, parallel)
        weights = {name: tensor.clone() for name, tensor in exported if tensor is not None}
        buckets = sum(len(group.buckets) for chunk in actor.chunks for group in chunk.bucket_groups)
        results.append({"norms": norms, "log_probs": log_probs, "weights": weights, "buckets": buckets})
        parallel.destroy()
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_hf(tmp_path_factory.mktemp("overlap"), "qwen3", vocab_size=VOCAB, num_layers=4))


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (
        one["norms"] == other["norms"]
        and all(torch.equal(a, b) for a, b in zip(one["log_probs"], other["log_probs"], strict=True))
        and one["weights"].keys() == other["weights"].keys()
        and all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
    )


def test_data_parallel_overlap_changes_no_bit(model: str) -> None:
    settings = [{}, BOTH, REDUCE | BUCKETS, BOTH | BUCKETS]
    for plain, whole, reduced, gathered in run_ranks(train_on_rank, 2, model, DP2, settings):
        assert plain["buckets"] == whole["buckets"] == 1 and gathered["buckets"] > 3
        assert len(set(plain["norms"])) == 6
        assert equal(plain, whole)
        assert equal(reduced, gathered)
        assert reduced["norms"] == pytest.approx(plain["norms"], rel=1e-5)
        for name, weight in plain["weights"].items():
            torch.testing.assert_close(reduced["weights"][name], weight, rtol=0, atol=1e-4)


def test_weights_that_were_not_settled_are_incomplete(model: str) -> None:
    assert run_ranks(unsettled_on_rank, 2, model) == [(True, False), (True, False)]


def unsettled_on_rank(folder: str) -> tuple[bool, bool]:
    """Whether ranks differ in a weight after an update, before and after it is settled."""
    import torch.distributed as dist

    actor, _, parallel = build_actor(folder, DP2, megatron_fields=BOTH)
    rows, _ = with_trainer_log_probs(actor, share_of_rank(make_rows(), parallel))
    actor.update(rows)

    def differ() -> bool:
        total = sum(float(parameter.detach().double().sum()) for parameter in actor.chunks[0].parameters())
        totals: list[Any] = [None, None]
        dist.all_gather_object(totals, total)
        return bool(totals[0] != totals[1])

    before = differ()
    actor.settle()
    return before, differ()


def test_pipeline_overlap_changes_no_bit(model: str) -> None:
    every = {"overlap_p2p_comm": True, **BOTH}
    for plain, overlapped in run_ranks(train_on_rank, 2, model, PIPELINE, [{}, every]):
        assert equal(plain, overlapped)
